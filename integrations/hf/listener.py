"""Tells a draft what the model is told, and has it read where something depends on that."""

from __future__ import annotations

from torch import Tensor

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.call import Call
from mmcompress.integrations.hf.draft import Draft, Reading, Told
from mmcompress.integrations.hf.vision import Vision


class Listener:
    """One draft beside one model.

    Args:
        draft: who reads.
        vision: knows the pictures of a pass.
        observed: whether a method reads what the draft attends to.
        lookahead: how many tokens a KV policy wants the draft to expect behind a prompt.
    """

    def __init__(self, draft: Draft, vision: Vision, observed: bool, lookahead: int) -> None:
        self.draft = draft
        self._vision = vision
        self._observed = observed
        self.lookahead = lookahead

    def tell(self, call: Call, current: Tensor, positions: Tensor) -> None:
        """Tell the draft what the model is told; it reads at once where a method depends on it.

        Args:
            call: the pass, which gets what the draft attends to.
            current: `[batch, length]` bool, which columns are no padding.
            positions: `[..., batch, length]`.

        Raises:
            UnsupportedError: the token ids are not known.
        """
        if call.ids is None:
            raise UnsupportedError("a draft reads token ids; pass input_ids, not inputs_embeds.")
        if call.state.reading is None and call.seen:
            return  # it missed the beginning, which matters only if it is asked
        positions = positions[-3:] if positions.dim() == 3 else positions
        told = Told(call.ids.to(current.device), current, positions)
        reads = bool(call.visual) and self._observed
        prompt, said = told.split(told.ids.shape[1] - (call.tail if reads else 0))
        call.state.reading = self.draft.hear(call.state.reading, prompt)
        if reads:
            observed = self._read(call).observed
            assert observed is not None
            call.drafted = observed[..., -prompt.ids.shape[1] :]  # what was said since the last prompt is read with it
            call.state.reading = self.draft.hear(call.state.reading, said)

    def expect(self, call: Call) -> Told:
        """What the draft expects behind the prompt.

        Raises:
            UnsupportedError: the draft has not read what the cache holds.
        """
        return self.draft.expect(self._read(call), self.lookahead)

    def _read(self, call: Call) -> Reading:
        """All that the draft was told, read."""
        reading = call.state.reading
        if reading is None:
            raise UnsupportedError("the draft has not read what this cache holds; start a new cache.")
        if reading.unread is None:
            return reading
        inputs: dict[str, Tensor] = {}
        copies = 1
        for modality, encoded in self._vision.pending.items():
            inputs |= encoded.inputs
            features = sum(len(layout.separator) for layout in encoded.layouts)
            copies = max(1, int(call.visual[modality].sum()) // features)
        call.state.reading = reading = self.draft.read(reading, inputs, copies)
        return reading
