"""The Gradio app and its Hugging Face Space."""
