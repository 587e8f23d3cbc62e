"""The LightningModules, their losses, optimizers and sharding."""
