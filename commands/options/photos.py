"""How a command reads data set `folder`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ebm_defense.data import FolderSettings, Framing, Source, open_data
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.purifiers.base import Purifier

FOLDER = "folder"


class Wanted(NamedTuple):
    """The images that a defense was made for: channels, and height and width; None where any."""

    channels: int | None = None
    size: int | None = None


ANY = Wanted()


def wanted_by(part: PurifiedClassifier | Purifier) -> Wanted:
    """Return what images a purifier takes, or else the network of a defense, as far as they say."""
    purifier = part if isinstance(part, Purifier) else part.purifier
    if purifier.image_shape is not None:
        return Wanted(*purifier.image_shape[:2])
    known = (getattr(module, "settings", None) for module in part.modules())
    return Wanted(next((c for s in known if (c := getattr(s, "channels", None))), None))


@dataclass(frozen=True, kw_only=True)
class Photos:
    """How the photos of data set `folder` are read; the other data sets are as they are."""

    resize: int | None = None
    """Data set folder: resize the shorter side to this, bicubic; as --crop if not given."""
    crop: int | None = None
    """Data set folder: cut out the centre square of this height and width."""
    channels: int | None = None
    """Data set folder: 1 for grey, 3 for colour; as the defense wants if not given."""
    background: str = "white"
    """Data set folder: what transparent pixels lie on: white, grey or black."""
    test_share: float | None = None
    """Data set folder, without split folders: keep this fixed share for testing."""
    class_map: str | None = None
    """Data set folder: which output each class folder is: a file (JSON, or names a line in the
    outputs' order), or numbers where folders are named by their outputs."""
    skip_bad: bool = False
    """Data set folder: leave out files that cannot be read, and say which."""

    def open(
        self,
        data: str,
        split: str,
        root: Path | None,
        wanted: Wanted = ANY,
        *,
        labelled: bool = True,
    ) -> Source:
        """Open a split of a data set, its photos as a defense wants them.

        Raises:
            UsageError: as `open_data`; or a size that the defense's energy does not take.
        """
        if data != FOLDER:
            if self != Photos():
                raise UsageError(f"how photos are read is for data set folder, not for {data}.")
            return open_data(data, split, root=root)
        if self.crop and wanted.size and self.crop != wanted.size:
            raise UsageError(
                f"the defense's energy takes {wanted.size}x{wanted.size} images; give --crop "
                f"{wanted.size}, not {self.crop}."
            )
        return open_data(data, split, root=root, folder=self._settings(wanted, labelled))

    def _settings(self, wanted: Wanted, labelled: bool) -> FolderSettings:
        framing = Framing(
            resize=self.resize,
            crop=self.crop,
            channels=self.channels or wanted.channels or 3,
            background=self.background,
        )
        return FolderSettings(
            framing=framing,
            test_share=self.test_share,
            labelled=labelled,
            class_map=self.class_map,
            skip_bad=self.skip_bad,
        )
