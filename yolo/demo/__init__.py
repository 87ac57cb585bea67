"""The web app: what it computes, and its pages."""
