"""How a tower cuts its input into units: patches of a picture, tubes of a video, pieces of a spectrogram, tokens.

Layouts are data. What reads them stands beside them: where a hidden state holds a grid in ``grids.py``, which units are
real in ``real_units.py``, how bits get from a hidden state to units and from there to the input in ``units.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

HALVINGS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class PatchLayout:
    r"""An input cut into a grid: pictures by height and width, videos also by frame, spectrograms by time and pitch.

    Args:

        patch_size (tuple[int, ...]): Extent of a patch along each axis of the grid, in elements of the input: (height,
            width) for a picture, (frames, height, width) for a video. (1, 1) with ``coarser`` covers every tower that
            halves its grid as it goes.
        prefix (int, optional): Tokens before the first patch (class token, registers). Default: 0
        suffix (int, optional): Tokens after the last patch (group tokens). A layer may lack the prefix, the suffix or
            both. Default: 0
        axes (tuple[int, ...], optional): The input's dimensions that the grid lies on. Default: None (the last ones)
        coarser (tuple[int, ...], optional): By which factors the stages of a hierarchical tower merge patches.
            Default: (1,)
        size (tuple[int, ...], optional): Extent of those axes inside the tower, where it resizes its input. Default:
            None (as the input comes)
        fold (int, optional): Into how many pieces the first axis is cut, which are then stacked along the second, as
            HTS-AT does with a spectrogram. Default: 1
        window (int, optional): Side of the square windows within which attention works. Default: None
        shift (int, optional): By how many patches windows are shifted in this layer. Default: 0
        frames_last (bool, optional): Whether this layer holds the grid's first axis last, (patches, frames), as blocks
            do that see the frames of each patch. Default: False
        whole_frames (bool, optional): Whether this layer holds one cell per step along the first axis, as blocks do
            that see whole frames. Default: False
        mask_argument (int, optional): Position, among all arguments of forward_func, of the mask that tells what is
            padding along the first axis, (N, extent of that axis): samples of a sound, frames of a video. A cell is
            real if its first element is, and shares its bits equally along that axis, so that none reach padding.
            Default: None

    Examples::

        >>> layout = PatchLayout(patch_size=(16, 16), prefix=1)
        >>> from captum_m2ib.engine.units import to_units
        >>> hidden, picture = torch.ones(2, 1 + 2 * 3, 8), torch.zeros(2, 3, 32, 48)
        >>> to_units(layout, hidden, picture).shape  # rows and columns; the class token is left out
        torch.Size([2, 2, 3])
    """

    patch_size: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    axes: tuple[int, ...] | None = None
    coarser: tuple[int, ...] = (1,)
    size: tuple[int, ...] | None = None
    fold: int = 1
    window: int | None = None
    shift: int = 0
    frames_last: bool = False
    whole_frames: bool = False
    mask_argument: int | None = None


@dataclass(frozen=True)
class PackedLayout:
    r"""An input that is a sequence of patches already, (N, patches, values), of pictures of any shape.

    Args:

        mask_argument (int, optional): Position, among all arguments of forward_func, of the mask that tells patches
            from padding, (N, patches). Default: None
        shapes_argument (int, optional): Position of the grids' heights and widths, (N, 2), or of these behind a number
            of frames, (N, 3). Without a mask they tell patches from padding. Default: None
        prefix (int, optional): Tokens before the first patch. Default: 0
        patch_size (tuple[int, int], optional): Height and width of a patch in pixels, to show maps at the picture's
            resolution. Default: (1, 1)
        merge (int, optional): Side of the square blocks whose patches follow one another, as Qwen2-VL orders them.
            Default: 1 (row by row)
        drops_padding (bool, optional): Whether the tower leaves padding out, so that a hidden state holds the patches
            of pictures of one size alone. Default: False
    """

    mask_argument: int | None = None
    shapes_argument: int | None = None
    prefix: int = 0
    patch_size: tuple[int, int] = (1, 1)
    merge: int = 1
    drops_padding: bool = False


@dataclass(frozen=True)
class TextLayout:
    r"""A text tower: one token of the hidden state per token of the input.

    Which tokens are real is read from an attention mask where there is one, else from the end token, else from the
    id of padding.

    Args:

        mask_argument (int, optional): Position of the attention mask among all arguments of forward_func (inputs,
            then additional arguments). Default: None
        end_token_id (int, optional): Tokens after the first end token are padding when there is no mask.
            Default: None
        ends_at_highest (bool, optional): The end token is the one with the highest id, as in CLIP's first vocabulary,
            whatever that id is. Default: False
        pad_token_id (int, optional): Tokens of this id before the first and after the last other one are padding when
            there is no mask. Default: None
        reads_padding (bool, optional): The tower reads padding like words, as SigLIP does. Padding is then told from
            words at the embeddings only; in later layers it holds what it has read, and every token counts. Default:
            False
        prefix (int, optional): Tokens that the tower itself puts before the input's. Default: 0
        suffix (int, optional): Tokens that the tower itself puts after them (CoCa's class token). A layer may lack
            the prefix, the suffix or both. Default: 0
        source (str, optional): Who says which tokens are real, as warnings call it: where the ids in hand end in a run
            of one id that it takes for words, that is said, and the run is taken for padding unless a mask speaks for
            it. Default: None (you say so, and nothing is looked for)

    Examples::

        >>> from captum_m2ib.engine.real_units import real_tokens
        >>> ids = torch.tensor([[0, 7, 9, 1, 1]])
        >>> real_tokens(TextLayout(end_token_id=1), ids, (ids,))
        tensor([[ True,  True,  True,  True, False]])
    """

    mask_argument: int | None = None
    end_token_id: int | None = None
    ends_at_highest: bool = False
    pad_token_id: int | None = None
    reads_padding: bool = False
    prefix: int = 0
    suffix: int = 0
    source: str | None = field(default=None, compare=False)


Layout: TypeAlias = PatchLayout | PackedLayout | TextLayout
