"""What a run learns from: image-text pairs (`distill`), questions (`answer`), or both on the same student."""
