"""The LightningModules, their losses and optimizers."""
