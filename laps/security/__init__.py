"""Who may call what, and how connections are kept private. `docs/security.md` tells the whole."""
