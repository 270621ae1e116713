"""The elastic encoder as Hugging Face models: any sub-network of one set of weights, at any call.

Tokens are packed once before the embeddings (no padding is computed) and unpacked once at the
output. No module knows a width or a depth: the `Subnet` is an argument of `forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models.configuration_dynabert import DynaBertConfig
from dynabert_fast.models.conversion import (
    BASE,
    from_huggingface,
    is_huggingface,
    read_checkpoint,
    to_huggingface,
)
from dynabert_fast.models.packed import Extent, MixedBatch, PackedSequences
from dynabert_fast.rewiring import FILE_NAME as REWIRING_FILE
from dynabert_fast.rewiring import Rewiring
from dynabert_fast.subnet import Subnet
from dynabert_fast.tree import SubnetTree

if TYPE_CHECKING:
    from dynabert_fast.engine import CpuEngine
    from dynabert_fast.engine.gpu import GpuEngine

#: What a call may run: one sub-network (`None`: the view's, or all), one for each sequence, or
#: several on every sequence.
SubnetArgument = Subnet | Sequence[Subnet] | SubnetTree | None

_HUB_KEYS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Arguments of `PreTrainedModel.from_pretrained` that are not fields of the configuration.
_LOADER_KEYS = (
    "device_map",
    "dtype",
    "ignore_mismatched_sizes",
    "output_loading_info",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "_from_auto",
    "_from_pipeline",
)


class ElasticExpand(nn.Module):
    """Weights of a map `D -> rows`, a prefix of whose output is used: weight `[*rows, D]`."""

    def __init__(self, rows: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*rows, hidden_size))
        self.bias = nn.Parameter(torch.empty(*rows))

    def forward(
        self, x: Tensor, extent: Extent, rows: list[int] | None = None, activation: str = ""
    ) -> Tensor:
        """`[T, D] -> [T, extent]`; one extent for each block of `rows`, or one."""
        weight, bias = self.weight.flatten(0, -2), self.bias.flatten()
        return ops.expand(x, weight, bias, extent, rows, activation)


class ElasticContract(nn.Module):
    """Weights of a map `rows -> D`, a prefix of whose input is used: weight_t `[rows, D]`."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_t = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor, extent: Extent, rows: list[int] | None = None) -> Tensor:
        """`[T, extent] -> [T, D]`."""
        return ops.contract(x, self.weight_t, self.bias, extent, rows)


def _draw_seed(p: float, training: bool, device: torch.device) -> Tensor | None:
    """A dropout seed from torch's generator of that device, `None` where dropout is off."""
    if not training or p == 0:
        return None
    return torch.randint(2**63 - 1, (), device=device)


def _times(extent: Extent, factor: int) -> Extent:
    return [k * factor for k in extent] if isinstance(extent, list) else extent * factor


class _ResidualNorm(nn.Module):
    """Dropout, residual and LayerNorm around a sublayer's output."""

    norm: nn.LayerNorm

    def residual_norm(self, y: Tensor, x: Tensor, p: float) -> Tensor:
        """`LayerNorm(dropout(y) + x)`, all `[T, D]`."""
        seed = _draw_seed(p, self.training, x.device)
        norm = self.norm
        return ops.residual_norm(
            y, x, norm.weight, norm.bias, norm.eps, p if seed is not None else 0.0, seed
        )


class DynaBertAttention(_ResidualNorm):
    """Self-attention over packed sequences with the first `heads` heads."""

    def __init__(self, config: DynaBertConfig, heads: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.attention_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.qkv = ElasticExpand((heads, 3, config.head_size), config.hidden_size)
        self.out = ElasticContract(heads * config.head_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, packed: PackedSequences, heads: Extent) -> Tensor:
        """`[T, D] -> [T, D]`."""
        qkv = self.qkv(x, _times(heads, 3 * self.head_size), packed.rows)
        seed = _draw_seed(self.attention_dropout, self.training, x.device)
        context = ops.attention(
            qkv,
            packed.offsets,
            packed.max_length,
            self.head_size,
            heads,
            packed.sequences,
            p=self.attention_dropout if seed is not None else 0.0,
            seed=seed,
        )
        y = self.out(context, _times(heads, self.head_size), packed.rows)
        return self.residual_norm(y, x, self.hidden_dropout)


class DynaBertFeedForward(_ResidualNorm):
    """Feed-forward block with the first `neurons` neurons."""

    def __init__(self, config: DynaBertConfig, neurons: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.hidden_dropout = config.hidden_dropout_prob
        self.up = ElasticExpand((neurons,), config.hidden_size)
        self.down = ElasticContract(neurons, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, packed: PackedSequences, neurons: Extent) -> Tensor:
        """`[T, D] -> [T, D]`."""
        y = self.down(self.up(x, neurons, packed.rows, self.activation), neurons, packed.rows)
        return self.residual_norm(y, x, self.hidden_dropout)


class DynaBertLayer(GradientCheckpointingLayer):
    """One encoder layer; how much of it is used is an argument."""

    def __init__(self, config: DynaBertConfig, heads: int, neurons: int) -> None:
        super().__init__()
        self.attention = DynaBertAttention(config, heads)
        self.ffn = DynaBertFeedForward(config, neurons)

    def forward(self, x: Tensor, packed: PackedSequences, heads: Extent, neurons: Extent) -> Tensor:
        """`[T, D] -> [T, D]`; several extents are those of the packing's lanes."""
        return self.ffn(self.attention(x, packed, heads), packed, neurons)


class DynaBertEmbeddings(nn.Module):
    """Word, token-type and position embeddings with LayerNorm and dropout."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def position_ids(self, input_ids: Tensor) -> Tensor:
        """BERT counts columns; RoBERTa counts non-padding tokens, from its padding id + 1."""
        if not self.config.is_roberta:
            return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        padding = self.config.pad_token_id or 0
        real = input_ids.ne(padding)
        return real.cumsum(1) * real + padding

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        packed: PackedSequences,
    ) -> Tensor:
        """Ids `[B, S] -> [T, D]`."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = self.position_ids(input_ids)
        p = self.config.hidden_dropout_prob
        seed = _draw_seed(p, self.training, input_ids.device)
        return ops.embed(
            packed.pack(input_ids),
            packed.pack(token_type_ids),
            packed.pack(position_ids),
            self.word.weight,
            self.token_type.weight,
            self.position.weight,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            p if seed is not None else 0.0,
            seed,
        )


class DynaBertPooler(nn.Module):
    """`tanh(dense(x))` of each sequence's first token."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """`[B, D] -> [B, D]`."""
        return torch.tanh(self.dense(first))


def _place(name: Any) -> str:
    """A device of a `device_map`, by one name: 0 is "cuda:0"; "disk" is a place too."""
    if isinstance(name, int):
        return f"cuda:{name}"
    return "cuda:0" if str(name) == "cuda" else str(name)


class DynaBertPreTrainedModel(PreTrainedModel):
    """Loading, saving and sub-network views, shared by the models below."""

    config_class = DynaBertConfig
    config: DynaBertConfig
    base_model_prefix = BASE
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynaBertLayer", "DynaBertEmbeddings"]

    _has_head = True

    #: The sub-network that a call without `subnet` runs: set on the views that `at` makes.
    _default_subnet: Subnet | None = None

    def __init__(self, config: DynaBertConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._known_subnets: set[Subnet] = set()
        self._record: dict[str, Rewiring | None] = {}  # one of the model and all its views

    @property
    def rewiring(self) -> Rewiring | None:
        """Importance and permutation that the weights were rewired with, `None` before rewiring."""
        return self._record.get("rewiring")

    @rewiring.setter
    def rewiring(self, value: Rewiring | None) -> None:
        self._record["rewiring"] = value

    def at(self, subnet: Subnet) -> Self:
        """A light view of this model that runs `subnet` by default and shares every weight.

        The view is a model like any other (for `pipeline`, for instance); several views and the
        model itself may run at the same time.

        Raises:
            InputError: The sub-network does not fit the model.
        """
        _check_kind(subnet)
        subnet.check(self.config)
        view = copy.copy(self)
        view._default_subnet = subnet
        # Wrappers that accelerate or `compile` put on this object would call it, not the view.
        view.__dict__.pop("forward", None)
        view._compiled_call_impl = None
        return view

    def _choose(self, subnet: SubnetArgument) -> Subnet | list[Subnet] | SubnetTree:
        """The sub-network of a call: the argument, or the view's, or the whole model."""
        if subnet is None:
            subnet = self._default_subnet or Subnet.full(self.config)
        given: list[Any] = list(subnet) if isinstance(subnet, list | tuple) else [subnet]
        if isinstance(subnet, SubnetTree):
            given = list(subnet.subnets)
        for one in given:
            _check_kind(one)
            if _compiling():  # a look into the set would be compiled in, and what it held then
                one.check(self.config)
            elif one not in self._known_subnets:
                one.check(self.config)
                if len(self._known_subnets) >= 4096:  # random widths: new ones in every step
                    self._known_subnets.clear()
                self._known_subnets.add(one)
        if isinstance(subnet, SubnetTree):
            return subnet
        return given if isinstance(subnet, list | tuple) else given[0]

    def extract(self, subnet: Subnet) -> Self:
        """A stand-alone model of one sub-network, with copies of just the weights it uses.

        It computes the same bits as this model at `subnet`. At full width it is an ordinary,
        shallower BERT, which plain `transformers` opens once saved.

        Raises:
            InputError: The sub-network does not fit the model.
        """
        _check_kind(subnet)
        subnet.check(self.config)
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = len(subnet.layers)
        config.num_attention_heads = max(subnet.heads)
        config.intermediate_size = max(subnet.neurons)
        config.heads_per_layer = list(subnet.heads) if len(set(subnet.heads)) > 1 else None
        config.neurons_per_layer = list(subnet.neurons) if len(set(subnet.neurons)) > 1 else None
        # Dropout must not differ from the original's, so the mode comes along.
        model = type(self)(config).to(dtype=self.dtype, device=self.device).train(self.training)
        own = self.state_dict()
        prefix = f"{BASE}." if any(name.startswith(f"{BASE}.") for name in own) else ""
        with torch.no_grad():
            for name, target in model.state_dict().items():
                parts = name.removeprefix(prefix).split(".")
                if parts[:2] == ["encoder", "layer"]:
                    parts[2] = str(subnet.layers[int(parts[2])])
                source = own[prefix + ".".join(parts) if prefix in name else name]
                target.copy_(source[tuple(slice(0, n) for n in target.shape)])
        return model

    def check_finite(self) -> None:
        """Raise `InputError` where a parameter is NaN or infinite, by its name in a checkpoint."""
        state = {name: parameter.data for name, parameter in self.named_parameters()}
        if all(tensor.isfinite().all() for tensor in state.values()):
            return
        saved = to_huggingface(state, self.config)
        first = next(name for name, tensor in saved.items() if not tensor.isfinite().all())
        raise InputError(
            f"weights must be finite, and {first} has NaN or infinite ones; train the model "
            "again, or copy its checkpoint again"
        )

    def pack(
        self, dtype: str | None = None, threads: int | None = None, isa: str | None = None
    ) -> CpuEngine | GpuEngine:
        """An engine with this model's function, for the device that the model is on.

        It is called like the model (of a view: with its sub-network where none is given, which a
        saved file does not keep), and runs every sub-network from one copy of the weights. On a
        CPU that is a packed copy, without torch inside; on a GPU calls are CUDA graphs.

        Args:
            dtype: On a CPU `int8` (default; one scale per output column, one per token), `bf16` or
                `fp32`; on a GPU `bf16` (default), `fp16` or `fp32`.
            threads: On a CPU, threads of a call; default all that the process may use.
            isa: On a CPU, the instruction set; default the best that the processor has.

        Raises:
            InputError: An argument is unknown, or a weight is NaN or infinite.
        """
        self.check_finite()
        if self.device.type == "cuda":
            from dynabert_fast.engine.gpu import GpuEngine

            if threads is not None or isa is not None:
                raise InputError("threads and isa are a CPU engine's; this model is on a GPU")
            return GpuEngine(self, dtype or "bf16")
        from dynabert_fast.engine import CpuEngine, PackedConfig, pack

        state = self.state_dict()
        labels = self.config.num_labels if "classifier.weight" in state else 0
        prefix = f"{BASE}." if labels else ""

        def weight(name: str) -> Any:
            tensor = state[name if name.startswith("classifier.") else prefix + name]
            return tensor.detach().float().cpu().numpy()

        config = PackedConfig.of(self.config, dtype or "int8", labels)
        return CpuEngine(config, pack(config, weight), threads, isa, self._default_subnet)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ElasticExpand):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, ElasticContract):
            init.normal_(module.weight_t, std=self.config.initializer_range)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: DynaBertConfig | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of ours or a plain BERT, RoBERTa, XLM-RoBERTa or CamemBERT one.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *model_args: Passed to the model's constructor.
            config: Instead of the checkpoint's own.
            **kwargs: Fields of the configuration to override (`num_labels=2`), and the arguments of
                `PreTrainedModel.from_pretrained` (`dtype`, `device_map`, `revision`, ...).

        Raises:
            InputError: The checkpoint is of another architecture, its files cannot be read, or
                `device_map` spreads it over several devices.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        source = str(pretrained_model_name_or_path)
        hub = {key: kwargs.pop(key) for key in _HUB_KEYS if key in kwargs}
        loader = {key: kwargs.pop(key) for key in _LOADER_KEYS if key in kwargs}
        state, variant = kwargs.pop("state_dict", None), kwargs.pop("variant", None)
        if not isinstance(config, DynaBertConfig):
            read, kwargs = DynaBertConfig.from_pretrained(
                config or source, return_unused_kwargs=True, **hub, **kwargs
            )
            assert isinstance(read, DynaBertConfig)
            config = read
        if state is None:
            state = read_checkpoint(source, variant, **hub)
        if is_huggingface(state):
            state = from_huggingface(state, config, cls._has_head)
        loaded = super().from_pretrained(
            None, *model_args, config=config, state_dict=state, **loader, **kwargs
        )
        model = loaded[0] if loader.get("output_loading_info") else loaded
        places = {_place(place) for place in getattr(model, "hf_device_map", {}).values()}
        if len(places) > 1:
            raise InputError(
                "a model runs on one device, device_map spreads it over "
                f"{', '.join(sorted(places))}; name one, device_map='cuda' for instance"
            )
        model.config.name_or_path = source
        model.rewiring = Rewiring.load(source, **hub)
        return loaded

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Save under Hugging Face's names and layouts, which `BertModel` or `RobertaModel` opens.

        Importance and permutation, if the model was rewired, are saved beside the weights.
        """
        state = to_huggingface(state_dict or self.state_dict(), self.config)
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True) and not folder.is_file():
            # First, as `push_to_hub` sends what is in the folder.
            folder.mkdir(parents=True, exist_ok=True)
            if self.rewiring is not None:
                self.rewiring.save(folder)
            else:  # another model's record may lie there
                (folder / REWIRING_FILE).unlink(missing_ok=True)
        super().save_pretrained(save_directory, state_dict=state, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch; also takes what `save_pretrained` wrote (Trainer resumes that way).

        Raises:
            InputError: It is a part of what `save_pretrained` wrote, such as one of its shards.
        """
        if is_huggingface(state_dict):
            queries = sum(name.endswith(".attention.self.query.weight") for name in state_dict)
            if queries < self.config.num_hidden_layers:
                raise InputError(
                    f"a state dict of {queries} of {self.config.num_hidden_layers} layers, under "
                    "Hugging Face's names: a shard cannot be loaded by itself; merge the shards, "
                    "or load their folder by from_pretrained"
                )
            state_dict = from_huggingface(state_dict, self.config, self._has_head)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class _Encoder(nn.Module):
    """The layers, under the name that Hugging Face gives them."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            DynaBertLayer(config, heads, neurons)
            for heads, neurons in zip(config.layer_heads, config.layer_neurons, strict=True)
        )


class DynaBertModel(DynaBertPreTrainedModel):
    """The elastic encoder with its pooler."""

    _has_head = False

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__(config)
        self.embeddings = DynaBertEmbeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = DynaBertPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embeddings.word = value

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | PackedSequences | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        subnet: Subnet | list[Subnet] | SubnetTree,
        keep_hidden: bool,
    ) -> tuple[Tensor, list[Tensor], PackedSequences]:
        """The packed last hidden state `[T, D]`, all hidden states if kept, and the packing.

        Of a tree, the last hidden states `[ends, T, D]`, of which `_in_order` makes one for each
        sub-network, and all that its edges name.
        """
        self._check_ids(input_ids, token_type_ids, position_ids)
        shape = (input_ids.shape[0], input_ids.shape[1])
        if isinstance(subnet, list):
            if isinstance(attention_mask, PackedSequences):
                raise InputError(
                    "a batch with a sub-network for each sequence is packed in an order of its "
                    "own; give its attention_mask as a tensor"
                )
            mixed = MixedBatch.from_mask(shape, attention_mask, input_ids.device, subnet)
            x = self.embeddings(input_ids, token_type_ids, position_ids, mixed.packed)
            x, hidden = self._encode_mixed(x, mixed, keep_hidden)
            return x, hidden, mixed.packed
        packed = self._packing(shape, attention_mask, input_ids.device)
        x = self.embeddings(input_ids, token_type_ids, position_ids, packed)
        if isinstance(subnet, SubnetTree):
            return *self._encode_tree(x, subnet, packed, keep_hidden), packed
        hidden = [x]
        for layer, heads, neurons in zip(subnet.layers, subnet.heads, subnet.neurons, strict=True):
            x = self.encoder.layer[layer](x, packed, heads, neurons)
            if keep_hidden:
                hidden.append(x)
        return x, hidden, packed

    @staticmethod
    def _packing(
        shape: tuple[int, int], mask: Tensor | PackedSequences | None, device: torch.device
    ) -> PackedSequences:
        if not isinstance(mask, PackedSequences):
            return PackedSequences.from_mask(shape, mask, device)
        if mask.shape != shape:
            raise InputError(f"the batch is packed as {list(mask.shape)}, got ids {list(shape)}")
        return mask

    def _encode_tree(
        self, x: Tensor, tree: SubnetTree, packed: PackedSequences, keep_hidden: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Every layer once, with the tree's nodes as lanes."""
        total = len(x)
        outputs: list[tuple[Tensor, ...]] = [(x,)]

        def join(sources: tuple[tuple[int, int], ...]) -> Tensor:
            parts = [outputs[output][piece] for output, piece in sources]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        lanes: dict[int, PackedSequences] = {}
        for level in tree.levels:
            count = len(level.heads)
            if count not in lanes:
                lanes[count] = packed.times(count, total)
            y = self.encoder.layer[level.layer](
                join(level.sources), lanes[count], list(level.heads), list(level.neurons)
            )
            # Pieces of one split: their gradients are joined once.
            cut = [nodes * total for nodes in level.pieces]
            outputs.append(y.split(cut) if len(cut) > 1 else (y,))
        last = join(tree.ends).unflatten(0, (1 + max(tree.order), total))
        hidden = [outputs[e.source[0]][e.source[1]] for e in tree.edges] if keep_hidden else []
        return last, hidden

    def _encode_mixed(
        self, x: Tensor, mixed: MixedBatch, keep_hidden: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Every layer once, for the lanes that keep it."""
        depths = sorted({len(lane.subnet.layers) for lane in mixed.lanes})
        if keep_hidden and len(depths) > 1:
            raise InputError(
                "output_hidden_states needs sub-networks of one depth, got "
                f"{' and '.join(map(str, depths))} layers; make one call for each"
            )
        states: list[list[Tensor]] = [[x[lane.rows]] for lane in mixed.lanes if keep_hidden]
        for index, layer in enumerate(self.encoder.layer):
            part = mixed.part(index)
            if part is None:
                continue
            x = part.restore(x, layer(part.select(x), part.packed, part.heads, part.neurons))
            for lane, found in zip(mixed.lanes, states, strict=False):
                if index in lane.subnet.layers:
                    found.append(x[lane.rows])
        return x, [torch.cat(state) for state in zip(*states, strict=True)] or [x]

    def _check_ids(
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> None:
        config = self.config
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise InputError(
                f"input_ids must be [batch, length] integers, got {list(input_ids.shape)} "
                f"{input_ids.dtype}"
            )
        if not 1 <= input_ids.shape[1] <= config.max_tokens:
            raise InputError(
                f"a sequence may have 1 to {config.max_tokens} tokens, got {input_ids.shape[1]}; "
                "truncate it"
            )
        for name, ids, count in (
            ("token ids", input_ids, config.vocab_size),
            ("token_type_ids", token_type_ids, config.type_vocab_size),
            ("position_ids", position_ids, config.max_position_embeddings),
        ):
            if ids is None:
                continue
            if ids.dtype not in (torch.int32, torch.int64):
                raise InputError(f"{name} must be int32 or int64, got {ids.dtype}; use .long()")
            if ids.shape != input_ids.shape:
                raise InputError(f"{name} must be {list(input_ids.shape)}, got {list(ids.shape)}")
            # On a GPU this check would synchronise; there an id out of range has results that are
            # NaN (Triton) or is a device assertion (torch).
            if ids.device.type != "cpu" or not ids.numel() or _compiling():
                continue
            low, high = ids.aminmax()
            if low < 0 or high >= count:
                raise InputError(
                    f"{name} must be in 0 to {count - 1}, got {int(low)} to {int(high)}; "
                    "is this the checkpoint's own tokenizer?"
                )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | PackedSequences | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        subnet: SubnetArgument = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpack: bool = True,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Run one sub-network.

        Args:
            input_ids: `[B, S]` int64.
            attention_mask: `[B, S]`, non-zero at real tokens; default all real. Or the
                `PackedSequences` made of it, where the caller has them.
            token_type_ids: `[B, S]` int64; default 0.
            position_ids: `[B, S]` int64; default the family's rule.
            subnet: The sub-network; or a list of one for each sequence, which then run in one call;
                or a `SubnetTree` of several that all run on every sequence; default the view's (see
                `at`), else the whole model.
            output_hidden_states: Also return the embeddings' and every kept layer's output.
            return_dict: `False` for a plain tuple.
            unpack: `False` returns hidden states of real tokens only, packed `[T, D]` (of a tree
                `[n, T, D]`); where each sequence has a sub-network of its own, those of one stand
                together, the deepest and widest first.

        Returns:
            `last_hidden_state` `[B, S, D]` (zero at padding), `pooler_output` `[B, D]`,
            `hidden_states`: a tuple of one more than the kept layers. Of a tree of n sub-networks
            `[n, B, S, D]` and `[n, B, D]`, and the tensor of each of its edges.

        Raises:
            InputError: Shapes, ids or the sub-network do not fit.
        """
        keep = _flag(output_hidden_states, self.config.output_hidden_states)
        chosen = self._choose(subnet)
        _check_packed(chosen, keep, unpack)
        x, hidden, packed = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, chosen, keep
        )
        first = packed.first(x)
        if isinstance(chosen, SubnetTree):
            x, first = _in_order(x, chosen), _in_order(first, chosen)
        last = x
        if unpack:
            many = x.dim() == 3
            last = torch.stack([packed.unpack(one) for one in x]) if many else packed.unpack(x)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.pooler(first),
            hidden_states=_hidden_output(hidden, packed, keep, unpack),
        )
        return output if _flag(return_dict, self.config.return_dict) else output.to_tuple()


class DynaBertForSequenceClassification(DynaBertPreTrainedModel):
    """The elastic encoder with a classification or regression head on the first token."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__(config)
        self.dynabert = DynaBertModel(config)
        p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | PackedSequences | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        subnet: SubnetArgument = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpack: bool = True,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Run one sub-network; arguments as in `DynaBertModel.forward`.

        Args:
            input_ids: `[B, S]` int64.
            attention_mask: `[B, S]`, or its `PackedSequences`.
            token_type_ids: `[B, S]` int64.
            position_ids: `[B, S]` int64.
            labels: `[B]` int64 classes, or `[B]` floats for regression (`num_labels=1`).
            subnet: The sub-network; or a list of one for each sequence, which then run in one call;
                or a `SubnetTree` of several that all run on every sequence; default the view's (see
                `at`), else the whole model.
            output_hidden_states: Also return all hidden states.
            return_dict: `False` for a plain tuple.
            unpack: `False` returns hidden states packed `[T, D]`.

        Returns:
            `loss` (with labels), `logits` `[B, C]`, `hidden_states` as asked for. Of a tree of n
            sub-networks the sum of their losses, `[n, B, C]`, and the tensor of each of its edges.

        Raises:
            InputError: Shapes, ids or the sub-network do not fit.
        """
        keep = _flag(output_hidden_states, self.config.output_hidden_states)
        chosen = self._choose(subnet)
        _check_packed(chosen, keep, unpack)
        x, hidden, packed = self.dynabert.encode(
            input_ids, attention_mask, token_type_ids, position_ids, chosen, keep
        )
        first = packed.first(x)
        if isinstance(chosen, SubnetTree):
            first = _in_order(first, chosen)
        if self.config.is_roberta:  # its head also drops out before the dense layer
            first = self.dropout(first)
        logits = self.classifier(self.dropout(self.dynabert.pooler(first)))
        loss = None
        if labels is not None and isinstance(chosen, SubnetTree):
            count = len(logits)
            labels = labels.expand(count, *labels.shape).flatten(0, 1)
            loss = count * self.loss_function(
                labels=labels, pooled_logits=logits.flatten(0, 1), config=self.config
            )
        elif labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=_hidden_output(hidden, packed, keep, unpack)
        )
        return output if _flag(return_dict, self.config.return_dict) else output.to_tuple()


def _check_kind(subnet: Any) -> None:
    if not isinstance(subnet, Subnet):
        raise InputError(f"subnet must be a Subnet, got {type(subnet).__name__}")


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _flag(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _check_packed(subnet: Subnet | list[Subnet] | SubnetTree, keep: bool, unpack: bool) -> None:
    if isinstance(subnet, SubnetTree) and keep and unpack:
        raise InputError(
            "the hidden states of several sub-networks on one batch are packed pieces, one for "
            "each of the tree's edges; ask for them with unpack=False"
        )


def _in_order(x: Tensor, tree: SubnetTree) -> Tensor:
    """Nodes at the tree's ends `[ends, ...]` to sub-networks `[n, ...]`."""
    if tree.order == tuple(range(len(x))):
        return x
    parts = x.unbind()
    return torch.stack([parts[i] for i in tree.order])


def _hidden_output(
    hidden: list[Tensor], packed: PackedSequences, keep: bool, unpack: bool
) -> tuple[Tensor, ...] | None:
    if not keep:
        return None
    return tuple(packed.unpack(h) if unpack else h for h in hidden)


AutoConfig.register(DynaBertConfig.model_type, DynaBertConfig)
AutoModel.register(DynaBertConfig, DynaBertModel)
AutoModelForSequenceClassification.register(DynaBertConfig, DynaBertForSequenceClassification)
