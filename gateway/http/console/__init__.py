"""The web console: static pages, and the questions that they ask."""
