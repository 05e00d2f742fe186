"""Knowledge of Transformers models: what determines the keys and values that a model computes."""
