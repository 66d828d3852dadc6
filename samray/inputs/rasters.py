"""Read an image of any size in parts: `open_raster`.

The file is decoded in a child process with limits on CPU time and memory, as in `decode_apart`: what is in it may crash
only that.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

from samray.errors import ConfigError, ImageError, StorageError
from samray.inputs.child import Answer, Child, ChildDied, how_it_ended, is_to_blame
from samray.inputs.decode import DECODE_ERRORS
from samray.inputs.decode_apart import PixelsOf, SharedPixels, limit_resource
from samray.inputs.gdal_files import needs_extra
from samray.inputs.raster_files import RasterFile
from samray.inputs.raster_source import Geo, Transform

if TYPE_CHECKING:
    from samray.config import InputConfig
    from samray.inputs.decode import RGBArray

MAX_PIXELS: Final = 2**36
"""Maximum pixels of an image that is read in parts; its width and height come from the file."""

PIXELS_PER_TIMEOUT: Final = 100_000_000
"""`input.decode_timeout_s` is for at most this many pixels; what reads the whole of a larger image has more time."""

_BASE_BYTES: Final = 3 << 30
"""Address space of the child: of the libraries, most of which is never used, and of GDAL's blocks."""

_BYTES_PER_PIXEL: Final = 40
_STORAGE: Final = "storage"


def open_raster(source: str | Path | bytes, config: InputConfig, *, max_pixels: int = MAX_PIXELS) -> Raster:
    """Open an image to read parts of it; use it in a `with` statement.

    source: the path of a local file, or the encoded bytes. config: its `bands`, `stretch` and `decode_timeout_s`; its
    `max_pixels` does not apply. max_pixels: above this the image is refused.
    Reads only the header. Raises: ImageError as `decode_image`; StorageError if the file cannot be opened.
    """
    return Raster(source, config, max_pixels)


def check_extra(what: str) -> None:
    """Raises: ConfigError that says what needs the extra `geo`, if it is not installed."""
    try:
        import rasterio  # noqa: F401
    except ImportError as error:
        raise ConfigError(needs_extra(what)) from error


Result = TypeVar("Result")


class Raster:
    """An image file whose parts can be read. Upright, as `decode_image` would give the whole. Thread-safe."""

    def __init__(self, source: str | Path | bytes, config: InputConfig, max_pixels: int) -> None:
        self._source = source if isinstance(source, bytes) else os.fsencode(os.path.abspath(source))
        self._kind = b"B" if isinstance(source, bytes) else b"P"
        self._timeout_s = config.decode_timeout_s
        settings = {"bands": config.bands, "stretch": config.stretch, "timeout_s": config.decode_timeout_s}
        self._setup = json.dumps({**settings, "max_pixels": max_pixels}).encode()
        self._child: Child | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self.height = self.width = 0
        self.geo: Geo | None = None
        """Its value in the column `geo`."""
        self.crs: str | None = None
        """As WKT 2; None without."""
        self.transform: Transform | None = None
        """(a, b, c, d, e, f) in the order of the package affine, from pixels to the CRS: x = a * column + b * row + c,
        y = d * column + e * row + f; (0, 0) is the outer corner of the first pixel. None without."""
        with self._lock:
            self._retry(self._child_that_opened)

    def read(self, x0: int, y0: int, x1: int, y1: int) -> RGBArray:
        """(y1 - y0, x1 - x0, 3) uint8 RGB of the pixels from (x0, y0) to before (x1, y1).

        The first call also unpacks a file that is not a TIFF to a temporary file. Raises: ImageError; StorageError if
        there is no room for that.
        """
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height):
            raise ValueError(f"{(x0, y0, x1, y1)} is not inside of {self.width}x{self.height}")
        request = json.dumps([x0, y0, x1, y1]).encode()

        def read() -> RGBArray:
            child, pixels = self._child_that_opened()
            answer = child.ask(b"R", request, timeout_s=self._wait_s(self.width * self.height))
            if answer[0].startswith(b"["):
                raise _error_of(json.loads(answer[0]))
            return pixels(answer)

        with self._lock:
            return self._retry(read)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._end_child()

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _wait_s(self, num_pixels: int) -> float:
        # On a busy machine the process may wait for the CPU within its CPU time.
        return 60 + 20 * self._timeout_s * _shares(num_pixels)

    def _retry(self, call: Callable[[], Result]) -> Result:
        """Call until it returns, or until it is certain that the image is what ends the process."""
        deaths: list[ChildDied] = []
        while True:
            try:
                return call()
            except ChildDied as death:
                self._child = None
                if death.returncode == -signal.SIGXCPU:
                    raise ImageError(
                        "timeout",
                        f"decoding took more than {self._timeout_s:g} seconds of CPU time per "
                        f"{PIXELS_PER_TIMEOUT:,} pixels (input.decode_timeout_s); convert the image to a tiled TIFF, "
                        "or raise the setting",
                    ) from death
                deaths.append(death)
                if is_to_blame(deaths):
                    raise ImageError(
                        "quarantined",
                        f"decoding only this image ended the process {len(deaths)} times, the last time by "
                        f"{how_it_ended(death.returncode)}",
                    ) from death

    def _child_that_opened(self) -> tuple[Child, PixelsOf]:
        if self._child is None:
            if self._is_closed:  # a thread that reads ahead
                raise ValueError("the image is closed")
            child = Child("samray.inputs.rasters:answer_with", self._setup)
            self._child, self._pixels = child, PixelsOf()
            head, _ = child.ask(self._kind, self._source, timeout_s=self._wait_s(1))
            header = json.loads(head)
            if isinstance(header, list):
                raise _error_of(header)
            self.height, self.width, self.geo = header["height"], header["width"], header["geo"]
            geo = self.geo or {}
            self.crs = geo.get("crs")
            self.transform = cast(Transform, tuple(geo["transform"])) if geo.get("transform") else None
        return self._child, self._pixels


def _error_of(answer: list[str]) -> ImageError | StorageError:
    reason, message = answer
    return StorageError(message) if reason == _STORAGE else ImageError(reason, message)


def _shares(num_pixels: int) -> int:
    return max(1, math.ceil(num_pixels / PIXELS_PER_TIMEOUT))


# --- the child's side -----------------------------------------------------------------------------------------------


def answer_with(setup: bytes) -> Callable[[bytes], Answer]:
    """See `child.Child`. Requests: P path or B bytes once, then R [x0, y0, x1, y1]."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    served = _Served(**json.loads(setup))

    def answer(request: bytes) -> Answer:
        try:
            if request[:1] == b"R":
                return served.read(*json.loads(request[1:]))
            return json.dumps(served.open(request[:1], request[1:])).encode(), None
        except ImageError as error:
            return json.dumps([error.reason, error.message]).encode(), None
        except MemoryError:
            return json.dumps(["out_of_memory", "the decoded image does not fit into memory"]).encode(), None
        except OSError as error:  # of the temporary file or of the path
            if error.errno == errno.EIO:  # a damaged disk: other files may be intact
                return json.dumps(["unreadable", f"{error.strerror}"]).encode(), None
            where = f" in {tempfile.gettempdir()} (TMPDIR)" if request[:1] == b"R" else ""
            return json.dumps([_STORAGE, f"{error.strerror or error}{where}"]).encode(), None
        except DECODE_ERRORS as error:
            return json.dumps(["unreadable", f"the data is damaged ({error})"[:400]]).encode(), None

    return answer


class _Served:
    """The file that a child reads."""

    def __init__(self, bands: list[int] | None, stretch: list[float] | None, timeout_s: float, max_pixels: int) -> None:
        self._bands = None if bands is None else tuple(bands)
        self._stretch = None if stretch is None else (stretch[0], stretch[1])
        self._timeout_s, self._max_pixels = timeout_s, max_pixels
        self._is_prepared = False
        self._shared = SharedPixels()

    def open(self, kind: bytes, source: bytes) -> dict[str, Any]:
        file: IO[bytes]
        if kind == b"B":
            file = tempfile.TemporaryFile()  # noqa: SIM115
            file.write(source)
            file.flush()
        else:
            file = open(os.fsdecode(source), "rb")  # noqa: SIM115
        self._size = os.fstat(file.fileno()).st_size
        self._limit(1, self._size)
        self._file = RasterFile(file, self._bands, self._stretch, self._max_pixels)
        return {key: getattr(self._file, key) for key in ("height", "width", "geo")}

    def read(self, x0: int, y0: int, x1: int, y1: int) -> Answer:
        if not self._is_prepared:
            num_pixels = self._file.width * self._file.height
            self._limit(num_pixels, self._size + 8 * min(num_pixels, 400_000_000))
            self._file.prepare()
            self._is_prepared = True
        num_pixels = (y1 - y0) * (x1 - x0)
        self._limit(num_pixels, num_pixels * _BYTES_PER_PIXEL)
        return self._shared.answer(self._file.read(x0, y0, x1, y1))

    def _limit(self, num_pixels: int, num_bytes: int) -> None:
        seconds = time.process_time() + self._timeout_s * _shares(num_pixels)
        limit_resource(resource.RLIMIT_CPU, math.ceil(seconds))
        limit_resource(resource.RLIMIT_AS, _BASE_BYTES + num_bytes)
