"""fastgpt.GPT as a model of transformers: generate, caches, Trainer, pipelines, Auto classes.

    model = FastGPTForCausalLM.from_gpt(gpt)        # the same weights, not copies
    model.save_pretrained(folder)
    fastgpt.huggingface.register()                  # in another program
    model = AutoModelForCausalLM.from_pretrained(folder)

Every shape of GPT can be saved so. Those that transformers has itself, as GPT-2 or Llama,
`GPT.save_pretrained` writes in a layout that needs no fastgpt to be loaded.
"""

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.huggingface.attention import attention
from fastgpt.layers import Block, Turn
from fastgpt.model import GPT, IGNORE


class FastGPTConfig(PreTrainedConfig):  # type: ignore[misc]
    """The attributes of GPTConfig, `tied` under transformers' name tie_word_embeddings.

    Raises:
        ValueError, TypeError: as GPTConfig does.
    """

    model_type = "fastgpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size", "sliding_window": "window",
    }  # fmt: skip

    def __init__(
        self, block_size: int = 1024, vocab_size: int = 50257, n_layer: int = 12, n_head: int = 12,
        n_embd: int = 768, dropout: float = 0.0, bias: bool | None = None,
        activation: str | None = None, variant: str = "gpt2", n_kv_head: int | None = None,
        n_head_dim: int | None = None, n_inner: int | None = None, norm_eps: float = 1e-5,
        rope_theta: float = 1e4, qk_norm: bool = False, window: int | None = None,
        recompute: int = 1,
        quantized: str | None = None, tie_word_embeddings: bool = True, use_cache: bool = True,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        given = locals()
        self.use_cache, self.tie_word_embeddings = use_cache, tie_word_embeddings
        shape = GPTConfig(
            tied=tie_word_embeddings,
            **{f.name: given[f.name] for f in fields(GPTConfig) if f.name != "tied"},
        )
        for f in fields(GPTConfig):
            if f.name != "tied":
                setattr(self, f.name, getattr(shape, f.name))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def gpt(self) -> GPTConfig:
        """The shape as `fastgpt.GPT` takes it."""
        names = [f.name for f in fields(GPTConfig) if f.name != "tied"]
        return GPTConfig(
            tied=self.tie_word_embeddings, **{name: getattr(self, name) for name in names}
        )

    @classmethod
    def of(cls, config: GPTConfig, **others: Any) -> "FastGPTConfig":
        """From a GPTConfig, and what else transformers knows of a model, as eos_token_id."""
        shape = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "tied"}
        return cls(tie_word_embeddings=config.tied, **shape, **others)


class FastGPTForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A GPT under transformers' interface; the GPT itself is the attribute gpt.

    Attention is `fastgpt.ops.attention` whatever attn_implementation says, with whatever mask that
    makes.
    """

    config_class = FastGPTConfig
    base_model_prefix = "gpt"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: FastGPTConfig) -> None:
        super().__init__(config)
        if config.quantized is not None:
            raise ValueError(
                "FastGPTForCausalLM: the weights must not be quantised, fastgpt.generate takes"
                f" those; got {config.quantized}"
            )
        config._attn_implementation = "fastgpt"
        self.gpt = GPT(config.gpt())
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_gpt(cls, gpt: GPT, **others: Any) -> "FastGPTForCausalLM":
        """Wrap a GPT. The weights are shared; others are attributes of FastGPTConfig."""
        with torch.device("meta"):
            model = cls(FastGPTConfig.of(gpt.config, **others))
        model.gpt = gpt
        model.config.dtype = gpt.wte.weight.dtype
        return model.train(gpt.training)  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GPT):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.gpt.wte = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.gpt.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.gpt.lm_head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers', and the GPT's own configuration follows."""
        table: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.gpt.config = replace(self.gpt.config, vocab_size=table.num_embeddings)
        return table

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with labels the mean loss in nats of each position's next token.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T past and present), 1 where there is a token and 0 where there is
                padding; or (B, 1, T, T past and present) as transformers takes it.
            position_ids: (B, T); where they start again, another document starts.
            past_key_values: any of transformers' caches.
            inputs_embeds: (B, T, C) in place of input_ids, positions not yet added.
            labels: (B, T) int64, input_ids or -100; they are shifted here.
            use_cache: whether to return a cache; as the configuration says, in training never.
            output_attentions: also return the weights, (B, H, Tq, Tk) a layer, by plain PyTorch.
            output_hidden_states: also return the residual stream before each block and the final
                states, (B, T, C) each.
            return_dict: a tuple if False.
            logits_to_keep: how many of the last positions, or which, get logits; all if 0.
            num_items_in_batch: if given, the loss is the sum divided by it.
            others: ignored, as transformers' models do.

        Returns:
            loss, logits, past_key_values, hidden_states, attentions. In training with labels there
            are no logits: the loss is made without them.

        Raises:
            ValueError: not one of input_ids and inputs_embeds, or more positions than block_size.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("FastGPTForCausalLM: there must be one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        c, (B, T) = self.config, given.shape[:2]
        output_attentions = c.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = c.output_hidden_states
        use_cache = (c.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=c)
        like = torch.empty((B, T, 0), dtype=self.gpt.wte.weight.dtype, device=given.device)
        masked = create_causal_mask if c.window is None else create_sliding_window_causal_mask
        mask = masked(
            config=c, inputs_embeds=like, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        states: list[Tensor] | None = [] if output_hidden_states else None
        weights: list[Tensor] | None = [] if output_attentions else None
        checkpointed = self.gradient_checkpointing and self.training
        more = (inputs_embeds, mask, position_ids, past_key_values, states, weights)
        if input_ids is not None and all(x is None for x in more) and not checkpointed:
            hidden = self.gpt.hidden(input_ids)
        else:
            hidden = self._hidden(
                given, mask, position_ids, past_key_values, states, weights, checkpointed
            )
        loss = None if labels is None else self._loss(hidden, labels, num_items_in_batch)
        logits = None
        if labels is None or not self.training:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.gpt.logits(hidden[:, keep])
        out = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else tuple(states),
            attentions=None if weights is None else tuple(weights),
        )  # fmt: skip
        as_dict = getattr(c, "return_dict", True) if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _loss(self, hidden: Tensor, labels: Tensor, count: int | Tensor | None) -> Tensor:
        loss = ops.linear_cross_entropy(
            hidden[:, :-1], self.gpt.output_weight, labels[:, 1:].to(hidden.device),
            ignore_index=IGNORE, reduction="mean" if count is None else "sum",
        )  # fmt: skip
        return loss if count is None else loss / count

    def _hidden(
        self, given: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None,
        states: list[Tensor] | None, weights: list[Tensor] | None, checkpointed: bool,
    ) -> Tensor:  # fmt: skip
        """GPT.hidden with everything that transformers may ask for besides."""
        gpt, T = self.gpt, given.shape[1]
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(T, device=given.device) + seen)[None]
            if isinstance(seen, int) and seen + T > gpt.config.block_size:
                raise ValueError(
                    "FastGPTForCausalLM: the context is at most block_size"
                    f" {gpt.config.block_size} tokens; got {T} after {seen} in the cache"
                )
        p = gpt.config.dropout if self.training else 0.0
        h = given if given.is_floating_point() else ops.embedding(given, gpt.wte.weight)
        if gpt.wpe is not None:
            h = h + F.embedding(position_ids, gpt.wpe.weight)
        h = F.dropout(h, p)
        turn = self._turn(position_ids)
        branch: Tensor | None = None
        for layer, block in enumerate(gpt.h):
            args: Any = (block, branch, h, mask, cache, layer, turn, weights is not None, p)
            if checkpointed:
                branch, h, entered, w = self._gradient_checkpointing_func(_run, *args)
            else:
                branch, h, entered, w = _run(*args)
            if states is not None:
                states.append(entered)
            if weights is not None and w is not None:
                weights.append(w)
        y: Tensor
        y, _ = gpt.ln_f(branch, h, p)
        if states is not None:
            states.append(y)
        return y

    def _turn(self, position_ids: Tensor) -> Turn | None:
        """Cosines and sines of each row's positions, (B or 1, T, D / 2)."""
        table = self.gpt._turn(0, self.gpt.config.block_size)
        return None if table is None else (table[0][position_ids], table[1][position_ids])


def _run(
    block: Block, branch: Tensor | None, h: Tensor, mask: Tensor | None, cache: Cache | None,
    layer: int, turn: Turn | None, weights: bool, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A block with transformers' cache and mask.

    -> the next branch, the stream it is to be added to, the stream that entered, the weights.
    """
    if branch is None:
        x = block.ln_1(h)
    else:
        x, h = block.ln_1(branch, h, p)
    entered = h
    attn = block.attn
    H, kv = attn.n_head, attn.n_kv_head
    q, k, v = attn.c_attn(x).unflatten(2, (H + 2 * kv, -1)).split([H, kv, kv], 2)
    if turn is not None:
        cos, sin = (t.expand(x.shape[0], -1, -1) for t in turn)
        norms: dict[str, Any] = {}
        if attn.q_norm is not None and attn.k_norm is not None:
            norms = {"q_weight": attn.q_norm.weight, "k_weight": attn.k_norm.weight,
                     "eps": attn.q_norm.eps or 0.0}  # fmt: skip
        q, k = ops.rotary(q, k, cos, sin, **norms)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cache is not None:
        k, v = cache.update(k, v, layer)
    o, w = attention(attn, q, k, v, mask, dropout=p, is_causal=True, output_attentions=weights)
    x, h = block.ln_2(attn.c_proj(o.flatten(2)), h, p)
    return block.mlp(x), h, entered, w
