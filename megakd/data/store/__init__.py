"""Teacher embeddings on disk: written once by `megakd embed`, read by runs."""
