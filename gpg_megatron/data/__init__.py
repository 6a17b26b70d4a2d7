"""Data sets -> prompts: row schema, rendering, the resumable stream, generators."""
