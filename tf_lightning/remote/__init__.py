"""Files at URLs such as https://, s3://, gs:// and hf://: found, and copied into a cache."""
