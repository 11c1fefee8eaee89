"""Shipped priors, a folder each: `weights.safetensors`, `card.json` and the `config.yaml` that made them."""
