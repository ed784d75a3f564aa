"""The data sets that `reflow-lab data` knows: where their owners offer them, what the files are called, what is in them.

Only what is known for certain is here: where no checksum is given, none is compared.
"""

from dataclasses import dataclass, field

from . import cifar


@dataclass(frozen=True)
class Official:
    """A data set as its owners publish it.

    places: where it is looked for without --source, each one or several paths under data/. url: where it may be fetched
    without asking anyone. pattern: which names belong to it, with their split and class. counts: images of each split.
    """

    page: str
    file: str
    places: tuple[tuple[str, ...], ...]
    resolution: int
    counts: dict[str, int]
    url: str | None = None
    pattern: str = r"(?:^|/)[^/]+$"
    has_labels: bool = True
    labels: bool = False  #: whether they are written unless --no-labels
    transform: str = "center-crop"
    archive: str = ""  #: EDM's name of the zip, without the resolution
    experiment: str = ""  #: that trains a base flow on it
    options: dict[str, str] = field(default_factory=dict)  #: keys of data that go with it
    latents: bool = False  #: whether latents are made of it, not a zip

    @property
    def has_own_data(self) -> bool:
        """Whether its experiment reads such a zip already: conf/data has a member for it."""
        return self.experiment.removesuffix("_base") in ("afhqv2", "ffhq", "imagenet64", "imagenet512")

    @property
    def split(self) -> str:
        """The split that is written unless --split names another."""
        return next(iter(self.counts), "all")


OFFICIAL = {
    "cifar10": Official(
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        file="cifar-10-python.tar.gz (MD5 " + cifar.MD5 + ")",
        places=(("cifar-10-python.tar.gz",),),
        url=cifar.URL,
        resolution=32,
        counts={"train": 50_000, "test": 10_000},
        labels=True,
        archive="cifar10",
        experiment="cifar10_base",
    ),
    "afhqv2": Official(
        page="https://github.com/clovaai/stargan-v2",
        file="afhq_v2.zip, the data set's second version (no checksum is known)",
        places=(("afhq_v2.zip",), ("afhq_v2",), ("afhqv2",)),
        resolution=64,
        counts={"all": 15_803, "train": 14_336, "test": 1_467},
        pattern=r"(?:^|/)(?P<split>train|test)/(?P<label>cat|dog|wild)/[^/]+$",
        archive="afhqv2",
        experiment="afhqv2_base",
    ),
    "ffhq": Official(
        page="https://github.com/NVlabs/ffhq-dataset",
        file="the folder images1024x1024 or thumbnails128x128 (no checksum is known)",
        places=(("images1024x1024",), ("thumbnails128x128",), ("images1024x1024.zip",), ("thumbnails128x128.zip",)),
        resolution=64,
        counts={"all": 70_000},
        has_labels=False,
        archive="ffhq",
        experiment="ffhq_base",
    ),
    "imagenet64": Official(
        page="https://image-net.org/download-images.php",
        file="ILSVRC2012's training images, unpacked to ILSVRC2012_img_train/nXXXXXXXX/*.JPEG (no checksum is known)",
        places=(
            ("ILSVRC2012_img_train",),
            ("ILSVRC/Data/CLS-LOC/train",),
            ("Imagenet64_train_part1_npz.zip", "Imagenet64_train_part2_npz.zip"),
        ),
        resolution=64,
        counts={"all": 1_281_167},
        pattern=r"(?:^|/)(?P<label>n\d{8})/[^/]+$",
        labels=True,
        transform="center-crop-dhariwal",
        archive="imagenet",
        experiment="imagenet64_base",
    ),
    "imagenet512": Official(
        page="https://image-net.org/download-images.php",
        file="ILSVRC2012's training images, as for imagenet64, or a zip of 512-pixel PNGs in EDM's format (no checksum is known)",
        places=(("ILSVRC2012_img_train",), ("ILSVRC/Data/CLS-LOC/train",), ("imagenet-512x512.zip",), ("img512.zip",)),
        resolution=512,
        counts={"all": 1_281_167},
        pattern=r"(?:^|/)(?P<label>n\d{8})/[^/]+$",
        labels=True,
        transform="center-crop-dhariwal",
        archive="imagenet",
        experiment="imagenet512_base",
        latents=True,
    ),
    "folder": Official(
        page="",
        file="",
        places=(),
        resolution=0,
        counts={},
        pattern=r"^(?:(?P<label>[^/]+)/)?",
        archive="folder",
        experiment="custom_base",
        options={"data.train_fraction": "0.8"},
    ),
}
