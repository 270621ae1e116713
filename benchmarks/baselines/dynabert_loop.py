"""The published algorithm as a plain loop, which `bench_distillation.py` compares with.

A padded BERT of ordinary modules whose weights are sliced to a width, and a training step of one
forward and backward pass for each sub-network. Eager PyTorch, nothing shared, nothing fused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.models.conversion import to_huggingface
from dynabert_fast.subnet import Subnet

Batch = Mapping[str, Tensor]
Output = tuple[Tensor, list[Tensor]]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class SlicedLinear(nn.Linear):
    """A linear map of which the first rows, or the first columns, are used."""

    def forward(self, x: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
        bias = self.bias if rows is None else self.bias[:rows]
        return F.linear(x, self.weight[:rows, :columns], bias)


class Embeddings(nn.Module):
    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        x = x + self.position_embeddings(torch.arange(ids.shape[1], device=ids.device))
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    def __init__(self, config: DynaBertConfig, sdpa: bool) -> None:
        super().__init__()
        self.head_size = config.head_size
        inner = config.num_attention_heads * config.head_size
        self.query = SlicedLinear(config.hidden_size, inner)
        self.key = SlicedLinear(config.hidden_size, inner)
        self.value = SlicedLinear(config.hidden_size, inner)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.sdpa = sdpa

    def forward(self, x: Tensor, mask: Tensor | None, heads: int) -> Tensor:
        def split(linear: SlicedLinear) -> Tensor:
            y = linear(x, rows=heads * self.head_size)
            return y.unflatten(-1, (heads, self.head_size)).transpose(1, 2)

        q, k, v = split(self.query), split(self.key), split(self.value)
        if self.sdpa:
            p = self.dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(q, k, v, mask, p)
        else:
            scores = q @ k.transpose(2, 3) * self.head_size**-0.5
            if mask is not None:
                scores = scores + mask
            context = self.dropout(scores.softmax(-1)) @ v
        return context.transpose(1, 2).flatten(2)


class Projection(nn.Module):
    """A sublayer's second linear map, dropout, residual and LayerNorm."""

    def __init__(self, config: DynaBertConfig, inner: int) -> None:
        super().__init__()
        self.dense = SlicedLinear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(y, columns=y.shape[-1])) + x)


class Layer(nn.Module):
    def __init__(self, config: DynaBertConfig, sdpa: bool) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_size
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config, sdpa), "output": Projection(config, inner)}
        )
        self.intermediate = nn.ModuleDict(
            {"dense": SlicedLinear(config.hidden_size, config.intermediate_size)}
        )
        self.output = Projection(config, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor | None, heads: int, neurons: int) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask, heads), x)
        middle = self.activation(self.intermediate["dense"](x, rows=neurons))
        return self.output(middle, x)


class LoopBert(nn.Module):
    """A BERT classifier with Hugging Face's names of weights; `forward` takes the sub-network.

    Args:
        config: Of the BERT family, all layers alike.
        sdpa: Use `scaled_dot_product_attention`; default what `transformers` calls eager.
    """

    def __init__(self, config: DynaBertConfig, sdpa: bool = False) -> None:
        super().__init__()
        self.config, self.sdpa = config, sdpa
        size = config.hidden_size
        layers = (Layer(config, sdpa) for _ in range(config.num_hidden_layers))
        self.bert = nn.ModuleDict(
            {
                "embeddings": Embeddings(config),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
                "pooler": nn.ModuleDict({"dense": nn.Linear(size, size)}),
            }
        )
        p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        self.classifier = nn.Linear(size, config.num_labels)

    @classmethod
    def of(cls, model: DynaBertForSequenceClassification, sdpa: bool = False) -> LoopBert:
        """The same weights, copied."""
        loop = cls(model.config, sdpa).to(model.device, model.dtype)
        loop.load_state_dict(to_huggingface(model.state_dict(), model.config))
        return loop

    def forward(self, batch: Batch, subnet: Subnet) -> Output:
        """Logits `[B, C]`, and one more hidden state `[B, S, D]` than there are kept layers."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        types = batch.get("token_type_ids")
        x = self.bert["embeddings"](ids, torch.zeros_like(ids) if types is None else types)
        if mask is not None:
            mask = mask[:, None, None, :].bool()
            if not self.sdpa:
                lowest = torch.finfo(x.dtype).min
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
        hidden = [x]
        layers = self.bert["encoder"]["layer"]
        for index, heads, neurons in zip(subnet.layers, subnet.heads, subnet.neurons, strict=True):
            hidden.append(layers[index](hidden[-1], mask, heads, neurons))
        pooled = torch.tanh(self.bert["pooler"]["dense"](hidden[-1][:, 0]))
        return self.classifier(self.dropout(pooled)), hidden


class DistillationLoop:
    """Training steps of a student over sub-networks, in their order, against a fixed teacher.

    Args:
        student: Trained.
        teacher: Fixed; runs at full depth.
        subnets: Made from multipliers: depth outer, width inner, descending.
        logits: Weight of the soft cross-entropy (of a regression's squared error).
        hidden: Weight of the sum of hidden states' squared errors, averaged over all positions.
        teacher_width: `same` as the student's, or `full`.
        once: With `full`: one teacher pass a step, instead of one, with the same result, a width.
        dtype: Of autocast; default none.
        learning_rate: Of AdamW.
    """

    def __init__(
        self,
        student: LoopBert,
        teacher: LoopBert,
        subnets: Sequence[Subnet],
        logits: float = 1.0,
        hidden: float = 1.0,
        teacher_width: str = "same",
        once: bool = False,
        dtype: torch.dtype | None = None,
        learning_rate: float = 2e-5,
    ) -> None:
        assert teacher_width == "full" or not once, "at the same width there is a pass for each"
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.subnets = subnets
        self.logits, self.hidden = logits, hidden
        self.teacher_width, self.once, self.dtype = teacher_width, once, dtype
        self.optimizer = torch.optim.AdamW(
            student.parameters(), learning_rate, eps=1e-8, weight_decay=0.0
        )

    def step(self, batch: Batch) -> Tensor:
        """Gradients, clipped, and one step of the optimiser; the loss."""
        loss = self.gradients(batch)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward of every sub-network; the sum of the losses."""
        mask = batch.get("attention_mask")
        if mask is not None and bool(mask.all()):
            batch = {name: t for name, t in batch.items() if name != "attention_mask"}
        teaching = self._teach(batch)
        total = torch.zeros((), device=batch["input_ids"].device)
        for subnet in self.subnets:
            with self._autocast(batch):
                loss = self._loss(self.student(batch, subnet), subnet, teaching[subnet.width])
            loss.backward()
            total = total + loss.detach()
        return total

    @torch.no_grad()
    def _teach(self, batch: Batch) -> dict[float | None, Output]:
        """The teacher's output for each width."""
        found: dict[float | None, Output] = {}
        for width in sorted({subnet.width or 1.0 for subnet in self.subnets}, reverse=True):
            if self.once and found:
                found[width] = next(iter(found.values()))
                continue
            of = width if self.teacher_width == "same" else 1.0
            with self._autocast(batch):
                found[width] = self.teacher(batch, Subnet.from_multipliers(self.student.config, of))
        return found

    def _loss(self, student: Output, subnet: Subnet, teacher: Output) -> Tensor:
        if student[0].shape[-1] == 1:
            loss = self.logits * F.mse_loss(student[0], teacher[0])
        else:
            cross = -(teacher[0].softmax(-1) * student[0].log_softmax(-1)).sum(-1).mean()
            loss = self.logits * cross
        wanted = [teacher[1][index] for index in (*subnet.layers, -1)]
        for ours, theirs in zip(student[1], wanted, strict=True):
            loss = loss + self.hidden * F.mse_loss(ours, theirs)
        return loss

    def _autocast(self, batch: Batch) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(batch["input_ids"].device.type, self.dtype)
