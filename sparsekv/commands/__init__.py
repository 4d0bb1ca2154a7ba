"""Commands that work with a model of the user's own: generate and chat."""
