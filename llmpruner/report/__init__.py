"""Pictures of models and results, as pages that need nothing but a browser."""
