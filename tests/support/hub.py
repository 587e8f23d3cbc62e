"""A Hugging Face hub in memory, in place of the file system hf:// of fsspec."""

import hashlib

from fsspec.implementations.memory import MemoryFileSystem


class Hub(MemoryFileSystem):
    """A hub in memory, with the infos that the real one gives."""

    protocol = "hf"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("hf://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"hf:/{name}"

    def info(self, path, **options):
        info = super().info(path, **options)
        info.pop("created", None)
        if info["type"] == "file":
            info["blob_id"] = hashlib.sha1(self.cat_file(path)).hexdigest()
        return info

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **options):
        found = super().find(path, maxdepth, withdirs, detail, **options)
        return {name: self.info(name) for name in found} if detail else found

    def ls(self, path, detail=True, **options):
        infos = super().ls(path, detail=True, **options)
        return [self.info(info["name"]) if detail else info["name"] for info in infos]
