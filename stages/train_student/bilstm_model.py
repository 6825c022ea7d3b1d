"""The BiLSTM of Tang et al. as transformers models: one sentence, or a pair read by one shared encoder; or its tokens.

Dimension key: B examples, T token positions, D features, C classes. This file is all that loading a finished BiLSTM
needs: it imports nothing of kd, and importing it makes the Auto classes of transformers know the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput

PACKED_COST = 1.5
"""Packed sequences are read where padded ones hold more than so many positions for every token.

On a CPU a packed token took 0.94 to 1.25 times what a position of oneDNN's fused kernel does (torch 2.13, one thread;
150 and 300 features, 1,500 to 3,000 tokens, float32 and bfloat16, with and without gradient): beyond this a batch is
faster packed, and batches of one length, which have little padding, keep the fused kernel. On a GPU the kernel waits
for the longest row either way, and the lengths would have to be copied back first.
"""


class BiLstmConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Shape of a `BiLstmForSequenceClassification`, or of a `BiLstmForTokenClassification`.

    Attributes:
        vocab_size: rows of the embedding table.
        embedding_size: D of a token's embedding.
        hidden_size: D of one direction; a layer's states have twice as many.
        num_hidden_layers: stacked bidirectional layers.
        head_size: width of the ReLU layer before the logits; 0 for logits straight from the sentence vector, or from
            the tokens' states.
        pooling: sentence vector from the last layer: "last" (final states of both directions), "max", "mean", or
            "attention" (mean with weights softmax(w . tanh(state)): Zhou et al., P16-2034).
        pair: whether input is two texts around `sep_token_id`, encoded apart and compared.
        dropout: on the embeddings and on the head's layer, in training.
        freeze_embeddings: whether the table stays as it was at the start.
        multichannel: whether a second table, which stays as it was at the start, is read beside the first.
        pad_token_id, sep_token_id, cls_token_id: as the tokenizer has them; the last two matter for pairs only.
    """

    model_type = "kd-bilstm"

    vocab_size: int = 30522
    embedding_size: int = 300
    hidden_size: int = 150
    num_hidden_layers: int = 1
    head_size: int = 200
    pooling: str = "max"
    pair: bool = False
    dropout: float = 0.1
    freeze_embeddings: bool = False
    multichannel: bool = False
    pad_token_id: int | None = 0
    sep_token_id: int | None = None
    cls_token_id: int | None = None

    @property
    def input_size(self) -> int:
        """D of what the first layer reads of a token."""
        return (2 if self.multichannel else 1) * self.embedding_size


@dataclass
class BiLstmOutput(ModelOutput):
    """Logits [B, C], of tokens [B, T, C]; on request the states of layers 0 (embeddings) to L and their sentence
    vectors.

    `encoded_mask` is True where a token was read: for pairs, special tokens are not.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    sentence_states: tuple[Tensor, ...] | None = None
    encoded_mask: Tensor | None = None


class BiLstmLayer(nn.Module):
    """One bidirectional layer over right-padded sequences; a padded position changes nothing and comes out as zeros.

    The backward direction reads each sequence reversed within its own length: this keeps the fused CPU kernel and
    exports to ONNX. Where most positions are padding, sequences are packed instead.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.forward_lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.backward_lstm = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(
        self, states_BTD: Tensor, reversal_BT: Tensor, mask_BT: Tensor, packed_lengths_B: Tensor | None = None
    ) -> Tensor:
        """[B, T, 2 D] of both directions; packed where lengths, 1 or more, are given."""
        forward_BTD = _read(self.forward_lstm, states_BTD, packed_lengths_B)
        backward_BTD = _read(self.backward_lstm, _take(states_BTD, reversal_BT), packed_lengths_B)
        both_BTD = torch.cat([forward_BTD, _take(backward_BTD, reversal_BT)], dim=-1)
        return both_BTD * mask_BT[..., None].to(both_BTD.dtype)


class BiLstmModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Embeddings, bidirectional LSTM and a head of a ReLU layer and logits, for those who say what the head reads.

    Args:
        features: D of what the head reads.
    """

    config: BiLstmConfig
    config_class = BiLstmConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"

    def __init__(self, config: BiLstmConfig, *, features: int, pooling: str) -> None:
        super().__init__(config)
        num_labels = int(config.num_labels or 0)
        self.num_labels = num_labels
        width = 2 * config.hidden_size

        def table() -> nn.Embedding:
            return nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)

        self.embeddings: nn.Module = table()
        self.static_embeddings = table() if config.multichannel else None
        self.layers = nn.ModuleList(
            BiLstmLayer(width if i else config.input_size, config.hidden_size) for i in range(config.num_hidden_layers)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.pooling = pooling
        self.attention = nn.Linear(width, 1, bias=False) if pooling == "attention" else None
        self.head = nn.Linear(features, config.head_size) if config.head_size else None
        self.classifier = nn.Linear(config.head_size or features, num_labels)
        self.post_init()  # type: ignore[no-untyped-call]
        self.embeddings.requires_grad_(not config.freeze_embeddings)
        if self.static_embeddings is not None:
            self.static_embeddings.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -0.25, 0.25)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Linear | nn.LSTM):
            module.reset_parameters()

    def _encode(self, ids_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
        """States [B, T, D] of layers 0 (embeddings) to L; zeros at padding from layer 1 on."""
        reversal, packed_lengths = _reversal(mask_BT), _lengths_to_pack(mask_BT)
        states = self.embeddings(ids_BT)
        if self.static_embeddings is not None:
            states = torch.cat([self.static_embeddings(ids_BT), states], dim=-1)
        states = self.dropout(states)
        every_layer = [states]
        for layer in self.layers:
            states = layer(states, reversal, mask_BT, packed_lengths)
            every_layer.append(states)
        return every_layer

    def _classify(self, features: Tensor) -> Tensor:
        hidden = features if self.head is None else self.dropout(torch.relu(self.head(features)))
        return self.classifier(hidden)  # type: ignore[no-any-return]

    def _pooled(self, states_BTD: Tensor, mask_BT: Tensor, layer: int) -> Tensor:
        """[B, D] of a layer."""
        if self.attention is not None and layer == len(self.layers):
            return _weighted(states_BTD, self.attention(torch.tanh(states_BTD)), mask_BT)
        # Embeddings have no direction, hence no final states; attention looks at the last layer alone.
        without = self.pooling == "attention" or (self.pooling == "last" and layer == 0)
        return _pool(states_BTD, mask_BT, "mean" if without else self.pooling)


class BiLstmForSequenceClassification(BiLstmModel):  # type: ignore[no-untyped-call]
    """Embeddings, bidirectional LSTM, pooled sentence vector, ReLU layer, logits (Tang et al., arXiv 1903.12136).

    For a pair, both texts go through the same encoder and the head sees [u; v; |u - v|; u * v]: there is no attention
    between them. Rows without any token are safe and get the logits of a zero vector.
    """

    def __init__(self, config: BiLstmConfig) -> None:
        features = (8 if config.pair else 2) * config.hidden_size
        super().__init__(config, features=features, pooling=config.pooling)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BiLstmOutput:
        """Logits of a batch.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T], 1 at true tokens; all when absent.
            token_type_ids: ignored; pairs are told apart by `sep_token_id`.
            labels: as the other sequence classifiers of transformers take them.
            output_hidden_states: also return `hidden_states` and `sentence_states`.
            return_dict: ignored; the output is always a `BiLstmOutput`.
        """
        mask_BT = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        side = _Sides(input_ids, mask_BT, self.config) if self.config.pair else None
        ids, mask = (input_ids, mask_BT) if side is None else (side.ids, side.mask)
        every_layer = self._encode(ids, mask)
        logits = self._classify(self._sentence(every_layer[-1], mask, len(self.layers)))

        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        if not output_hidden_states:
            return BiLstmOutput(loss=loss, logits=logits)
        return BiLstmOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(s if side is None else side.put_back(s) for s in every_layer),
            sentence_states=tuple(self._sentence(s, mask, layer) for layer, s in enumerate(every_layer)),
            encoded_mask=mask_BT if side is None else side.encoded_mask,
        )

    def _sentence(self, states_BTD: Tensor, mask_BT: Tensor, layer: int) -> Tensor:
        """[B, D] of a layer; for pairs [B, 4 D] from states of 2 B texts, all first texts before all second ones."""
        pooled = self._pooled(states_BTD, mask_BT, layer)
        if not self.config.pair:
            return pooled
        first, second = pooled.chunk(2)
        return torch.cat([first, second, (first - second).abs(), first * second], dim=-1)


class BiLstmForTokenClassification(BiLstmModel):  # type: ignore[no-untyped-call]
    """Embeddings, bidirectional LSTM, and per token a ReLU layer and logits.

    Nothing is pooled for the logits; who asks for sentence vectors of the layers gets the greatest value of each
    feature.
    """

    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__(config, features=2 * config.hidden_size, pooling="max")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BiLstmOutput:
        """Logits [B, T, C] of a batch.

        Args are those of `BiLstmForSequenceClassification`; labels are [B, T], -100 where there is none.
        """
        mask_BT = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        every_layer = self._encode(input_ids, mask_BT)
        logits = self._classify(every_layer[-1])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, config=self.config)
        if not output_hidden_states:
            return BiLstmOutput(loss=loss, logits=logits)
        return BiLstmOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(every_layer),
            sentence_states=tuple(self._pooled(states, mask_BT, layer) for layer, states in enumerate(every_layer)),
            encoded_mask=mask_BT,
        )


class _Sides:
    """A batch of B pairs as 2 B single texts without special tokens: all first texts, then all second ones."""

    def __init__(self, input_ids: Tensor, mask_BT: Tensor, config: BiLstmConfig) -> None:
        assert config.sep_token_id is not None, "pairs need sep_token_id"
        separator_BT = input_ids.eq(config.sep_token_id) & mask_BT
        after_BT = separator_BT.cumsum(1) > 0
        text_BT = mask_BT & ~separator_BT
        if config.cls_token_id is not None:
            text_BT = text_BT & input_ids.ne(config.cls_token_id)
        kept = torch.cat([text_BT & ~after_BT, text_BT & after_BT])
        lengths = kept.sum(1)
        longest = max(1, int(lengths.max()))
        # Kept positions first, in their order: a stable sort by "not kept".
        self.positions = (~kept).int().argsort(dim=1, stable=True)[:, :longest]
        self.mask = torch.arange(longest, device=input_ids.device) < lengths[:, None]
        self.ids = input_ids.repeat(2, 1).gather(1, self.positions).masked_fill(~self.mask, config.pad_token_id or 0)
        self.encoded_mask = text_BT
        self._length = input_ids.shape[1]

    def put_back(self, states: Tensor) -> Tensor:
        """States [2 B, S, D] of the single texts at the positions [B, T, D] their tokens had; zeros elsewhere."""
        count, _, width = states.shape
        index = self.positions[..., None].expand(-1, -1, width)
        whole = states.new_zeros(count, self._length, width)
        whole = whole.scatter(1, index, states * self.mask[..., None].to(states.dtype))
        first, second = whole.chunk(2)
        return first + second


def _reversal(mask_BT: Tensor) -> Tensor:
    """[B, T] positions that reverse each sequence within its length; padded positions point at 0."""
    last_B1 = mask_BT.sum(1, keepdim=True) - 1
    return (last_B1 - torch.arange(mask_BT.shape[1], device=mask_BT.device)).clamp(min=0)


def _lengths_to_pack(mask_BT: Tensor) -> Tensor | None:
    """int64 [B] lengths, 1 or more, where reading packed sequences is faster; None where it is not."""
    # A compiled or exported graph has one way for all batches, and is asked first: nothing may depend on a size there.
    if torch.compiler.is_compiling() or mask_BT.device.type != "cpu" or mask_BT.shape[0] == 1:
        return None
    # Rows without tokens cannot be packed: one padded position is read, and masked again.
    lengths_B = mask_BT.sum(1).clamp(min=1)
    return lengths_B if PACKED_COST * int(lengths_B.sum()) < mask_BT.numel() else None


def _read(lstm: nn.LSTM, states_BTD: Tensor, packed_lengths_B: Tensor | None) -> Tensor:
    if packed_lengths_B is None:
        states_BTD, _ = lstm(states_BTD)
        return states_BTD
    packed = pack_padded_sequence(states_BTD, packed_lengths_B, batch_first=True, enforce_sorted=False)
    padded_BTD, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=states_BTD.shape[1])
    return padded_BTD


def _take(states_BTD: Tensor, positions_BT: Tensor) -> Tensor:
    return states_BTD.gather(1, positions_BT[..., None].expand(-1, -1, states_BTD.shape[-1]))


def _pool(states_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """[B, D]; zeros for a row without tokens."""
    if pooling == "mean":
        total_BD = (states_BTD * mask_BT[..., None].to(states_BTD.dtype)).sum(1)
        return total_BD / mask_BT.sum(1, keepdim=True).clamp(min=1)
    if pooling == "max":
        highest_BD = states_BTD.masked_fill(~mask_BT[..., None], float("-inf")).amax(1)
        return highest_BD.masked_fill(~mask_BT.any(1, keepdim=True), 0.0)
    # last: the forward direction ends at the last true token, the backward one at the first.
    half = states_BTD.shape[-1] // 2
    last_B = (mask_BT.sum(1) - 1).clamp(min=0)
    rows_B = torch.arange(len(last_B), device=last_B.device)
    final_BD = torch.cat([states_BTD[rows_B, last_B, :half], states_BTD[:, 0, half:]], dim=-1)
    return final_BD.masked_fill(~mask_BT.any(1, keepdim=True), 0.0)


def _weighted(states_BTD: Tensor, scores_BT1: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, D] mean of the states with softmax weights; zeros for a row without tokens, whose states are zeros."""
    lowest = torch.finfo(scores_BT1.dtype).min
    weights_BT1 = scores_BT1.masked_fill(~mask_BT[..., None], lowest).softmax(1)
    return (states_BTD * weights_BT1.to(states_BTD.dtype)).sum(1)


AutoConfig.register(BiLstmConfig.model_type, BiLstmConfig, exist_ok=True)
AutoModelForSequenceClassification.register(BiLstmConfig, BiLstmForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(BiLstmConfig, BiLstmForTokenClassification, exist_ok=True)
