"""Plugs for other libraries; each module imports its library lazily."""
