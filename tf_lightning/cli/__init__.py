"""The command line: LightningCLI's verbs and our own."""
