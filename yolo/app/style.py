"""How the app looks: one theme, one style sheet, nothing fetched from elsewhere."""

import gradio as gr

from yolo.viz.draw import class_color

THEME = gr.themes.Default(
    primary_hue=gr.themes.colors.indigo,
    secondary_hue=gr.themes.colors.indigo,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_md,
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono"), "ui-monospace", "monospace"],
)

CSS = """
.gradio-container { width: 100%; max-width: min(1360px, 100vw) !important;
  margin: 0 auto !important; }
.gradio-container .main.app { padding: 16px clamp(14px, 2.5vw, 32px) 32px !important;
  min-width: 0; }
.gradio-container .main.app > .wrap, .gradio-container main.contain { min-width: 0; width: 100%; }
.html-container { padding: 0 !important; }
.hero h1 { font-size: 1.6rem; font-weight: 700; letter-spacing: -0.01em; margin: 0; }
.hero p { color: var(--body-text-color-subdued); margin: 2px 0 0; }
.caption p { margin: 0; line-height: 1.45; min-height: 1.45em; }
.scale { display: flex; align-items: center; gap: 8px; font-size: 0.8rem;
  color: var(--body-text-color-subdued); }
.scale i { flex: 1; height: 6px; border-radius: 3px; max-width: 240px;
  background: linear-gradient(90deg, #30123b,
  #4669e0, #29bbec, #31f299, #a3fd3c, #edd03a, #fb8022, #d23105, #7a0403); }
.chips { display: flex; flex-wrap: wrap; gap: 8px; }
.chip { display: inline-flex; align-items: center; gap: 7px; padding: 3px 11px 3px 8px;
  border-radius: 999px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary); }
.chip i { width: 11px; height: 11px; border-radius: 50%; }
.detections > .wrap { max-height: 172px; overflow-y: auto; gap: 8px; padding: 2px; }
.detections label { padding: 5px 12px 5px 10px; border-radius: 999px;
  font-variant-numeric: tabular-nums; }
.detections label input { position: absolute; opacity: 0; }
.detections label span { margin-left: 0; }
.detections label::before { content: ""; width: 11px; height: 11px; border-radius: 50%;
  margin-right: 7px; flex: none; background: var(--body-text-color-subdued); }
.detections label.selected { border-color: var(--color-accent);
  box-shadow: 0 0 0 1px var(--color-accent); }
.detections label:has(input:focus-visible) { outline: 2px solid var(--color-accent);
  outline-offset: 2px; }
.detections label:has(input[value^="missed"]) { border-style: dashed; }
.samples > .gallery { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; width: 100%; }
.samples .gallery-item, .samples .gallery-item .container { width: 100%; height: auto;
  aspect-ratio: 1; max-height: none; max-width: none; }
.samples img { width: 100%; height: 100%; object-fit: cover; }
/* the message is enough */
[data-testid="status-tracker"]:has(.error) { display: none !important; }
.prose table th, .prose table td { border-color: var(--border-color-primary); padding: 7px 12px; }
.clickable img { cursor: pointer; }
.picture img { max-height: 72vh; object-fit: contain; }
.misclassified .gallery-container, .misclassified .grid-wrap { min-height: 0; max-height: none;
  height: auto; }
.misclassified .grid-container { grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); }
.misclassified .thumbnail-item { aspect-ratio: 2 / 1; }
footer > .divider:last-child { display: none; }
/* Gradio applies media queries to the inside of the page only. */
@media (max-width: 640px) {
  .hero h1 { font-size: 1.35rem; }
  .samples > .gallery { grid-template-columns: none; grid-auto-flow: column;
    grid-auto-columns: 84px; max-width: calc(100vw - 28px); overflow-x: auto; padding-bottom: 6px; }
}
"""


def style_sheet(num_classes: int) -> str:
    """Return the style sheet, in which each detection in the list has the colour of its class."""
    dots = (
        f'.detections label:has(input[value$="-{label}"])::before '
        f"{{ background: rgb{class_color(label)}; }}\n"
        for label in range(num_classes)
    )
    return CSS + "".join(dots)
