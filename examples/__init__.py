"""A tiny trained base model, real LoRA adapters on it, and what each of them does."""
