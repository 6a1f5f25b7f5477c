"""Operations on transformers models: building without weights, cutting, silencing, copying, generating."""
