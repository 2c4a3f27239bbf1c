"""Standard data sets by name: the built-in digits, MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017)."""

import gzip
import shutil
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from torch.hub import download_url_to_file

from frugan.config.recipe import Data
from frugan.data.sources.base import ArraySource, Source
from frugan.data.sources.idx import CLASSES, idx_folder
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder

DIGITS = Path(__file__).with_name("digits.npz")  # digits.txt says what it is and whose
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # as torchvision calls them, whose copies are read too

# Where the gzipped files lie, in the order in which they are tried.
MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion-mnist": [
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ],
}

# SHA-256 of the gzipped files as they were published.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
}


def as_published() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 digits of Alpaydin and Kaynak (1998): grey uint8 ``[1797, 8, 8]`` in 0..16, and labels int64 ``[1797]`` in 0..9."""
    with np.load(DIGITS) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)


def digits(data: Data) -> Source | None:
    """The built-in digits, brought to 0..255 and enlarged from 8x8 to 16x16 to be readable."""
    if data.data != "digits":
        return None
    images, labels = as_published()
    small = np.rint(images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC)) for i in small])
    source = ArraySource("digits", large, labels, [str(i) for i in range(10)])
    source.unused = (*source.unused, "split")
    return source


def named(data: Data) -> Source | None:
    """MNIST and Fashion-MNIST: a copy in the working folder, in ``data/`` or in the cache, else the download.

    Raises:
        UserError: there is no copy, and none can be fetched.
    """
    name = data.data.lower().replace("_", "-")
    if name == "fashionmnist":
        name = "fashion-mnist"
    if name not in FOLDERS or Path(data.data).exists():
        return None
    kind = FOLDERS[name]
    for root in (Path(), Path("data"), cache_folder()):
        for folder in (root / name, root / kind / "raw"):
            if (source := idx_folder(folder, name, data.split, CLASSES[name])) is not None:
                return source
    part, whole = cache_folder() / f".{kind}.part", cache_folder() / kind
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(part.with_suffix(".lock")):
            if (source := idx_folder(whole / "raw", name, data.split, CLASSES[name])) is not None:
                return source  # another process has fetched it meanwhile
            shutil.rmtree(part, ignore_errors=True)
            _fetch(name, part / "raw")
            shutil.rmtree(whole, ignore_errors=True)
            part.replace(whole)  # so that what is there is complete
    except OSError as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"cannot download {name} ({why}); put its four IDX files into {Path('data') / name} and run the same command again."
        ) from None
    return idx_folder(whole / "raw", name, data.split, CLASSES[name])


def _fetch(name: str, folder: Path) -> None:
    """Downloads the four files of ``name`` into ``folder``, and unpacks them: then they are mapped, and take no memory.

    Raises:
        OSError: no mirror gives one of them as it was published, or they cannot be written.
    """
    folder.mkdir(parents=True)
    for file, sha256 in SHA256[name].items():
        packed = folder / f"{file}.gz"
        _download([mirror + packed.name for mirror in MIRRORS[name]], packed, sha256)
        with gzip.open(packed) as content, (folder / file).open("wb") as unpacked:
            shutil.copyfileobj(content, unpacked)
        packed.unlink()


def _download(urls: Sequence[str], to: Path, sha256: str) -> None:
    """Writes what the first of ``urls`` gives that has this SHA-256.

    Raises:
        OSError: none does; says why of each.
    """
    refused = []
    for url in urls:
        try:
            download_url_to_file(url, str(to), sha256, progress=sys.stderr.isatty())
            return
        except (OSError, HTTPException) as error:
            why = str(getattr(error, "reason", error))
        except RuntimeError:
            why = "another file than was published"
        refused.append(f"{urlsplit(url).netloc}: {why}")
    raise OSError("; ".join(refused))
