"""`python -m tf_lightning` is `tf-lightning`."""

from tf_lightning.cli.main import main

main()
