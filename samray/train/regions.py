"""Classical hierarchical segmentation: regions of a photograph at every scale, without learning.

The first teacher of the embedded model on photographs. Colour and brightness edges split the image into about a
thousand pieces (watershed); the two most similar neighbours are merged repeatedly until one region is left. The merges
and their costs form a tree; cutting it at a cost gives a segmentation.

Sources: Arbelaez et al., "Contour Detection and Hierarchical Image Segmentation", PAMI 2011 (the tree of regions from a
watershed); Felzenszwalb and Huttenlocher, IJCV 2004 (merging large regions needs more evidence).
"""

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.segmentation import watershed

Float = npt.NDArray[np.float32]

SIDE = 480
"""Longest side, in pixels, of the images for which the constants below were chosen."""
_SIGMAS = (1.0, 2.0)
_CHROMA_WEIGHT = 2.0
_EDGE_GAIN = 8.0
_TEXTURE_WEIGHT = 2.0
_DIFFERENCE_WEIGHT = 3.0
_SIZE_POWER = 0.5


@dataclass(frozen=True, slots=True)
class RegionTree:
    """N leaves and their merges. Node i < N is leaf i; a parent has a higher number than its children."""

    leaves: npt.NDArray[np.int32]
    """(H, W), the leaf of each pixel."""
    parent: npt.NDArray[np.int32]
    """(M,), M = 2N - 1; -1 for the root."""
    cost: Float
    """(M,), cost of the merge that made the node, never below its children's; 0 for leaves."""
    area: npt.NDArray[np.int64]
    """(M,), pixels."""

    def mask(self, node: int) -> npt.NDArray[np.bool_]:
        """(H, W) bool, the pixels of a node."""
        inside = np.zeros(len(self.parent), bool)
        inside[node] = True
        # Parents have higher numbers, so one pass downwards reaches all descendants.
        for child in range(node - 1, -1, -1):
            inside[child] |= inside[self.parent[child]] if self.parent[child] <= node else False
        mask: npt.NDArray[np.bool_] = inside[self.leaves]
        return mask

    def cut(self, cost: float) -> npt.NDArray[np.int64]:
        """The nodes of the segmentation at `cost`: made at or below it, and merged further only above it."""
        above = np.where(self.parent >= 0, self.cost[self.parent], np.inf)
        return np.flatnonzero((self.cost <= cost) & (above > cost))


def region_tree(image: npt.NDArray[np.uint8]) -> RegionTree:
    """The tree of an (H, W, 3) RGB image, best at about SIDE pixels; takes about a second per image."""
    features = _features(image)
    edges = _edges(features)
    return _merge(edges, _watershed(edges), features)


def _features(image: npt.NDArray[np.uint8]) -> list[Float]:
    """CIE Lab, each about 0..1, and the local variation of brightness."""
    rgb = image.astype(np.float32) / 255
    # sRGB to linear light, to XYZ relative to the white point D65, to CIE Lab.
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    xyz = linear @ to_xyz.T.astype(np.float32) / np.array([0.950456, 1, 1.088754], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lightness = np.clip(1.16 * f[..., 1] - 0.16, 0, 1)
    a = np.clip((500 * (f[..., 0] - f[..., 1]) + 60) / 120, 0, 1)
    b = np.clip((200 * (f[..., 1] - f[..., 2]) + 60) / 120, 0, 1)
    texture = ndimage.gaussian_filter(np.abs(lightness - ndimage.gaussian_filter(lightness, 2)), 2)
    return [np.asarray(c, np.float32) for c in (lightness, a, b, texture)]


def _edges(features: list[Float]) -> Float:
    """(H, W): strength of the change in Lab at each pixel, over two scales."""
    total = np.zeros_like(features[0])
    for sigma in _SIGMAS:
        for channel, weight in zip(features[:3], (1.0, _CHROMA_WEIGHT, _CHROMA_WEIGHT), strict=True):
            smooth = ndimage.gaussian_filter(channel, sigma)
            gradient = (ndimage.sobel(smooth, 0) / 8) ** 2 + (ndimage.sobel(smooth, 1) / 8) ** 2
            total += (weight * sigma) ** 2 * gradient
    return np.asarray(_EDGE_GAIN * np.sqrt(total), np.float32)


def _watershed(edges: Float) -> npt.NDArray[np.int32]:
    """(H, W): the basin of each pixel, numbered from 0 without gaps."""
    smooth = ndimage.gaussian_filter(edges, 1.0)
    # Seeds: the minima of edge strength within 7 x 7 pixels.
    seeds, _ = ndimage.label(ndimage.minimum_filter(smooth, 7) == smooth, np.ones((3, 3)))
    basins = watershed(smooth, seeds)  # not scipy's watershed_ift, which floods across soft edges
    return np.unique(basins, return_inverse=True)[1].reshape(basins.shape).astype(np.int32)


def _borders(edges: Float, leaves: npt.NDArray[np.int32]) -> list[dict[int, tuple[float, float]]]:
    """For each leaf, its neighbours: sum of the edge strength along the common border, and the border's length."""
    n = int(leaves.max()) + 1
    ends, strengths = [], []
    # Horizontal neighbours, then vertical ones.
    for first, second in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        first_leaf, second_leaf = leaves[first], leaves[second]
        differs = first_leaf != second_leaf
        pair = np.stack([first_leaf[differs], second_leaf[differs]]).astype(np.int64)
        # One number per pair of leaves, whichever of the two comes first.
        ends.append(pair.min(0) * n + pair.max(0))
        strengths.append(np.maximum(edges[first], edges[second])[differs])
    keys, index = np.unique(np.concatenate(ends), return_inverse=True)
    sums, lengths = np.bincount(index, np.concatenate(strengths)), np.bincount(index)
    neighbours: list[dict[int, tuple[float, float]]] = [{} for _ in range(n)]
    for key, total, length in zip(keys.tolist(), sums.tolist(), lengths.tolist(), strict=True):
        i, j = divmod(key, n)
        neighbours[i][j] = neighbours[j][i] = (total, float(length))
    return neighbours


def _merge(edges: Float, leaves: npt.NDArray[np.int32], features: list[Float]) -> RegionTree:
    """Merge the cheapest pair of neighbours until one region is left.

    A merge costs (mean edge strength along the border + difference of the mean features) x (smaller area)^0.5.
    """
    weighted = [w * c for w, c in zip((1.0, _CHROMA_WEIGHT, _CHROMA_WEIGHT, _TEXTURE_WEIGHT), features, strict=True)]
    flat = leaves.ravel()
    n = int(leaves.max()) + 1
    area = np.bincount(flat, minlength=n).tolist()
    # Per leaf the sums of the weighted features, which add up when leaves merge.
    sums = [tuple(row) for row in np.stack([np.bincount(flat, c.ravel(), n) for c in weighted], axis=1).tolist()]
    neighbours = _borders(edges, leaves)
    parent, cost = [-1] * n, [0.0] * n

    def merge_cost(i: int, j: int) -> float:
        strength, length = neighbours[i][j]
        # Distance between the mean features of both regions.
        apart = sum((a / area[i] - b / area[j]) ** 2 for a, b in zip(sums[i], sums[j], strict=True)) ** 0.5
        return float((strength / length + _DIFFERENCE_WEIGHT * apart) * min(area[i], area[j]) ** _SIZE_POWER)

    queue = [(merge_cost(i, j), i, j) for i in range(n) for j in neighbours[i] if i < j]
    heapq.heapify(queue)
    highest = 0.0
    while queue:
        value, i, j = heapq.heappop(queue)
        # One of the two was merged since: skipping such entries is cheaper than removing them from the heap.
        if parent[i] >= 0 or parent[j] >= 0:
            continue
        merged = len(parent)
        parent[i] = parent[j] = merged
        # Costs must not fall towards the root, or a cut would not be a segmentation.
        highest = max(highest, value)
        parent.append(-1)
        cost.append(highest)
        area.append(area[i] + area[j])
        sums.append(tuple(a + b for a, b in zip(sums[i], sums[j], strict=True)))
        # The borders of both with a common neighbour add up.
        around: dict[int, tuple[float, float]] = {}
        for old in (i, j):
            for other, (strength, length) in neighbours[old].items():
                if parent[other] < 0:
                    before = around.get(other, (0.0, 0.0))
                    around[other] = (before[0] + strength, before[1] + length)
            neighbours[old] = {}
        neighbours.append(around)
        for other, border in around.items():
            neighbours[other][merged] = border
            neighbours[other].pop(i, None)
            neighbours[other].pop(j, None)
            heapq.heappush(queue, (merge_cost(merged, other), merged, other))
    return RegionTree(leaves, np.array(parent, np.int32), np.array(cost, np.float32), np.array(area, np.int64))
