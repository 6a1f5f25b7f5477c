"""ChatGLM."""
