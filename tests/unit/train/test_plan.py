"""The plan: counts are exact, memory moves with the settings as it must; `benchmarks/plan.py` holds it against runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.classify import Target
from forge_ray.config.optimizer import Offload
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.models.architecture import Head
from forge_ray.train.optimizer import make_optimizer
from forge_ray.train.plan import BLOCK, UNBLOCKED, Model, _is_allowed, memory, nearest, not_counted, plan

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return Model.of(tiny_model_dir)


def of(model: Model, workers: int = 1, precision: str = "bf16", **settings: Any) -> Any:
    return memory(model, parse(TrainConfig, settings), precision, 128, workers)


def test_parameter_counts_match_torch(model: Model, tiny_model_dir: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from forge_ray.train.adapter import with_adapter

    real: Any = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert model.num_parameters == sum(parameter.numel() for parameter in real.parameters())
    for targets in ("all-linear", ("q_proj", "down_proj")):
        config = parse(TrainConfig, {"adapter": {"r": 4, "target_modules": targets}})
        assert config.adapter is not None
        adapted = with_adapter(LlamaForCausalLM.from_pretrained(tiny_model_dir), config.adapter)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert model.num_trained(config) == trained
    assert model.num_trained(parse(TrainConfig, {})) == model.num_parameters


def test_zero_stage_shards_model_states(model: Model) -> None:
    one, eight = (of(model, workers, zero_stage=2) for workers in (1, 8))
    assert one.weights == eight.weights == 2 * model.num_parameters
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=1e-4)
    third = of(model, 8, zero_stage=3)
    assert third.weights == math.ceil(2 * model.num_parameters / 8)


def test_offload_moves_states_to_host_and_sequence_parallel_halves_activations(model: Model) -> None:
    inside = of(model, 4, zero_stage=3)
    outside = of(model, 4, zero_stage=3, offload={"optimizer": "cpu"})
    assert (outside.gradients, outside.optimizer, outside.weights) == (0, 0, inside.weights)
    assert outside.host >= inside.gradients + inside.optimizer
    assert outside.total < inside.total
    all_of_it = of(model, 4, zero_stage=3, offload={"optimizer": "cpu", "parameters": "cpu"})
    assert all_of_it.weights + all_of_it.host == outside.weights + outside.host
    assert inside.host == 0
    shared = of(model, 4, sequence_parallel=2, scaling={"num_workers": 4})
    assert (shared.activations, shared.logits) == (of(model, 4).activations // 2, of(model, 4).logits // 2)


def test_activations_scale_with_micro_batch_and_checkpointing(model: Model) -> None:
    small, large = (of(model, micro_batch_size=size) for size in (1, 4))
    assert large.activations == 4 * small.activations
    assert of(model, activation_checkpointing=True).activations < small.activations
    assert of(model, adapter={"r": 4}).optimizer < small.optimizer / 2


def test_linear_layers_in_4_bits_take_half_a_byte_a_weight(model: Model) -> None:
    settings: dict[str, Any] = {"scaling": {"gpus_per_worker": 1}}
    whole = of(model, adapter={"r": 4}, **settings)
    narrow = of(model, adapter={"r": 4, "quantize": "nf4"}, **settings)
    layers = sum(math.prod(shape) for name, shape in model.shapes.items() if "_proj" in name)
    assert 0 < layers < model.num_parameters
    assert whole.weights - narrow.weights == pytest.approx(layers * (2 - 0.516), rel=1e-3)
    assert narrow.total < whole.total


def test_nearest_fitting_settings_change_least(model: Model) -> None:
    stats = SimpleNamespace(num_rows=100, num_tokens=12_000, num_trained_tokens=6_000)
    dataset: Any = SimpleNamespace(splits={"train": stats}, sequence_length=128)
    config = parse(TrainConfig, {"micro_batch_size": 4, "zero_stage": 1, "global_batch": 8})

    def needs(**settings: Any) -> int:
        return plan(model, config.model_copy(update=settings), "bf16", dataset, 4).memory.total

    def fits(room: int) -> dict[str, Any] | None:
        proposal = nearest(model, config, "bf16", dataset, 4, room)
        names = ("micro_batch_size", "activation_checkpointing", "zero_stage")
        return proposal and {
            name: getattr(proposal, name) for name in names if getattr(proposal, name) != getattr(config, name)
        }

    assert fits(needs()) == {}
    assert fits(needs() - 1) == {"micro_batch_size": 1}
    smaller = needs(micro_batch_size=1)
    assert fits(smaller - 1) == {"micro_batch_size": 1, "activation_checkpointing": True}
    assert fits(1) is None
    config = parse(TrainConfig, {"adapter": {"method": "dora"}, "zero_stage": 1, "global_batch": 8})
    assert not _is_allowed(config.model_copy(update={"zero_stage": 3}))  # DoRA wants whole weights
    proposed = [nearest(model, config, "bf16", dataset, 4, room) for room in range(0, needs(), needs() // 50)]
    assert {proposal.zero_stage for proposal in proposed if proposal} == {1, 2}
    large = {"engine": "deepspeed", "zero_stage": 3, "global_batch": 8}
    config = parse(TrainConfig, large)
    model = replace(model, shapes={f"model.layers.{n}.weight": (4096, 4096) for n in range(32)})  # more than a bucket
    for offload in ({"optimizer": "cpu"}, {"optimizer": "cpu", "parameters": "cpu"}):
        room = plan(
            model, parse(TrainConfig, large | {"activation_checkpointing": True, "offload": offload}), "bf16", dataset, 4
        )
        moved = nearest(model, config, "bf16", dataset, 4, room.memory.total)
        assert moved is not None
        assert moved.offload == Offload.model_validate(offload)
    config = parse(TrainConfig, {"micro_batch_size": 4, "zero_stage": 1, "global_batch": 8})
    whole = plan(model, config, "bf16", dataset, 4)
    assert (whole.steps, whole.num_tokens, whole.num_trained_tokens) == (13, 12_480, 6_240)


def test_plan_reads_only_config_from_object_store(model: Model, tiny_model_dir: Path) -> None:
    from forge_ray.store.files import Store, hash_dir
    from forge_ray.train.preflight import configuration

    store = Store("mock:///")
    base: Any = SimpleNamespace(id="mv_1", files=hash_dir(tiny_model_dir))
    for entry in base.files:
        store.write(f"models/mv_1/{entry.path}", (tiny_model_dir / entry.path).read_bytes())
    folder = configuration(store, base)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert Model.of(folder).shapes == model.shapes


def test_mistral_small_4_size_from_config_alone() -> None:
    folder = Path(__file__).parents[3] / "jobs/models/mistral-small-4"
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    small = Model.of(folder)
    experts = sum(math.prod(shape) for name, shape in small.shapes.items() if ".experts." in name)
    assert (small.num_parameters, small.num_active, experts) == (118_972_826_624, 6_632_588_288, 115_964_116_992)
    assert small.block * 2 == 6_442_450_944  # bytes that ZeRO-3 gathers for one layer
    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    config = parse(TrainConfig, {"adapter": parameters, "zero_stage": 3, "activation_checkpointing": True})
    needs = memory(small, config, "bf16", 4096, 8)
    assert needs.weights == pytest.approx(2 * small.num_parameters / 8, rel=0.01)
    kept = memory(small, config.model_copy(update={"activation_checkpointing": False}), "bf16", 4096, 8)
    assert kept.activations - needs.activations > 35 * 6.4e9  # each layer keeps its adapted experts
    assert needs.working > 3 * 6.4e9  # gathered, adapted, and their gradient


def test_modules_to_save_are_counted_in_full(model: Model) -> None:
    plain, saved = (parse(TrainConfig, {"adapter": {"r": 4, "modules_to_save": names}}) for names in ([], ["lm_head"]))
    size = math.prod(model.shapes["lm_head.weight"])
    assert model.num_trained(saved) == model.num_trained(plain) + size
    before, after = (memory(model, config, "bf16", 128, 1) for config in (plain, saved))
    assert after.weights == before.weights + 2 * size  # the base's own stays next to the trained copy
    assert after.optimizer == before.optimizer + 12 * size
    assert after.activations == before.activations


def test_adafactor_state_is_that_of_torch(model: Model, tiny_model_dir: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    config = parse(TrainConfig, {"optimizer": {"name": "adafactor"}, "engine": "torch", "zero_stage": 0})
    real: Any = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    optimizer = make_optimizer(list(real.named_parameters()), config)
    for parameter in real.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert memory(model, config, "fp32", 128, 1).optimizer == sum(4 * value.numel() for value in kept)
    assert memory(model, config, "bf16", 128, 1).optimizer < 5 * model.num_parameters


def test_moments_in_8_bits_have_two_scales_a_block_and_small_weights_stay_in_fp32(model: Model) -> None:
    gpu = {"gpus_per_worker": 1}
    config = parse(TrainConfig, {"optimizer": {"name": "adamw_8bit"}, "engine": "torch", "zero_stage": 0, "scaling": gpu})
    sizes = list(map(math.prod, model.shapes.values()))
    assert min(sizes) < UNBLOCKED <= max(sizes)
    kept = sum(2 * size + 8 * (size // BLOCK) if size >= UNBLOCKED else 8 * size for size in sizes)
    assert memory(model, config, "fp32", 128, 1).optimizer == pytest.approx(kept, abs=8 * len(sizes))


def test_adamw_in_8_bits_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"gpus_per_worker": 1}
    config = parse(TrainConfig, {"optimizer": {"name": "adamw_8bit"}, "engine": "torch", "zero_stage": 0, "scaling": gpu})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="adamw_8bit needs bitsandbytes"):
        make_optimizer([], config)


def test_frozen_weights_are_counted_out(model: Model) -> None:
    config = parse(TrainConfig, {"freeze": ["embed_tokens", "layers.0"]})
    frozen = [name for name in model.shapes if "embed_tokens" in name or ".layers.0." in name]
    assert model.shapes.keys() - model.trained(config).keys() == set(frozen)
    left = model.num_parameters - sum(math.prod(model.shapes[name]) for name in frozen)
    assert model.num_trained(config) == left
    assert of(model, engine="torch", zero_stage=0, freeze=list(config.freeze)).optimizer == 12 * left
    with pytest.raises(ConfigError, match=r"'layers\.9' matches nothing"):
        model.num_trained(parse(TrainConfig, {"freeze": ["layers.9"]}))


def test_weights_of_a_classifier_are_counted_with_its_head(tiny_model_dir: Path) -> None:
    head = Head((Target(labels=("a", "b", "c")),))
    classifier = Model.of(tiny_model_dir, head)
    assert classifier.shapes["score.weight"] == (3, 64)
    assert "lm_head.weight" not in classifier.shapes
    frozen = parse(TrainConfig, {"freeze": ["score", "layers.0"]})
    left = {name for name in classifier.shapes if "score" not in name and ".layers.0." not in name}
    assert classifier.trained(frozen).keys() == left
    with pytest.raises(ConfigError, match="'lm_head' matches nothing"):
        classifier.num_trained(parse(TrainConfig, {"freeze": ["lm_head"]}))
    adapter = parse(TrainConfig, {"adapter": {"r": 4, "modules_to_save": ["embed_tokens"]}}).adapter
    assert adapter is not None
    assert classifier.saved(adapter).keys() == {"model.embed_tokens.weight", "score.weight"}


def test_frozen_router_and_vision_tower_are_not_trained(tmp_path: Path) -> None:
    from transformers import Mistral3Config, Mistral4Config

    text = Mistral4Config(hidden_size=64, num_hidden_layers=2, n_routed_experts=8, vocab_size=100, moe_intermediate_size=32)
    sees = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    Mistral3Config(
        text_config=text.to_dict(), vision_config=sees | {"num_attention_heads": 2}, tie_word_embeddings=False
    ).save_pretrained(tmp_path)
    model = Model.of(tmp_path)
    outside = sum(math.prod(shape) for name, shape in model.shapes.items() if "language_model" not in name)
    head = 100 * 64
    assert model.num_trained(parse(TrainConfig, {})) == model.num_parameters - (outside - head)
    frozen = model.num_trained(parse(TrainConfig, {"router": "frozen"}))
    assert model.num_trained(parse(TrainConfig, {})) - frozen == 2 * 8 * 64


def test_plan_needs_neither_data_nor_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed run of Mistral Small 4, and what it says of the adapter; nothing is written."""
    from forge_ray.cli.show import print_plan
    from forge_ray.config.base import load
    from forge_ray.config.run import RunConfig
    from forge_ray.errors import ConfigError
    from forge_ray.pipeline import plan as planned
    from forge_ray.store.files import Store
    from forge_ray.train.preflight import Assumptions

    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 40)  # whatever this machine has
    root = Path(__file__).parents[3]
    folder = f"base_model={root / 'jobs/models/mistral-small-4'}"
    store = Store(str(tmp_path / "store"))
    config = load(RunConfig, root / "jobs/mistral-small-4.yaml", (folder,))
    card = Assumptions(memory_gb=80, num_rows=10_000)
    estimate = planned(config, store, card)
    assert (estimate.num_workers, estimate.plan.num_tokens, estimate.problem) == (8, 313 * 32 * 4096, "")
    assert estimate.to_json()["adapter"]["reached_of_all"] > 0.99
    assert planned(config, store, replace(card, memory_gb=50)).problem
    priced = planned(config, store, replace(card, tokens_per_s=1000, cost_per_hour=2))
    assert priced.seconds == pytest.approx(313 * 32 * 4096 / 8000)
    assert priced.cost == pytest.approx(priced.seconds / 3600 * 8 * 2)
    print_plan(estimate)
    printed = capsys.readouterr().out
    assert "6,632,588,288" in printed
    assert "mlp.experts.gate_up_proj: 36 weights" in printed
    assert "adapted experts under ZeRO-3: 40 % of the sum was measured in addition" in printed
    assert not (tmp_path / "store").exists()
    wrong = load(RunConfig, root / "jobs/mistral-small-4.yaml", (folder, "train.adapter={target_modules: [q_proj, o_proj]}"))
    with pytest.raises(ConfigError, match="'q_proj' matches nothing"):
        planned(wrong, store, card)


def test_adapter_coverage_is_reported_before_training(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from forge_ray.config.adapter import Adapter
    from forge_ray.errors import ConfigError
    from forge_ray.store.catalog import Catalog
    from forge_ray.train.preflight import report_reach

    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    report_reach(store, "run_reach", base, Adapter(r=4))
    assert "all-linear: 14 weights" in capsys.readouterr().err
    assert store.read_json("runs/run_reach/adapter.json")["patterns"][0]["modules"] == 14
    with pytest.raises(ConfigError, match="'qproj' matches nothing"):
        report_reach(store, "run_refused", base, Adapter(target_modules=("qproj",)))
    assert not store.exists("runs/run_refused/adapter.json")


def test_reference_pass_is_stated(model: Model, tiny_model_dir: Path) -> None:
    """Bytes of what is kept, and the memory of a frozen model, which is asked before the run's own is loaded."""
    from forge_ray.train.stated import Stated

    rows = Stated.of(100, 64)  # every token is trained
    distil = parse(TrainConfig, {"method": {"kind": "distil", "teacher": "t", "k": 10}})
    small, large = plan(model, distil, "bf16", rows, 1, model), plan(model, distil, "bf16", rows, 1, large_of(model))
    assert small.reference_tokens == 6400
    assert small.reference_bytes == 6400 * (10 * 8 + 4)
    assert small.reference_memory > 2 * model.num_parameters + 2 * 64 * model.num_logits
    assert small.worker_bytes == small.memory.total
    assert large.worker_bytes == large.reference_memory > 20 * small.reference_memory
    assert large.reference_active == large_of(model).num_parameters
    pairs = plan(model, parse(TrainConfig, {"method": {"kind": "dpo"}}), "bf16", rows, 1)
    assert (pairs.reference_tokens, pairs.reference_bytes, pairs.reference_memory) == (6400, 800, 0)
    assert plan(model, parse(TrainConfig, {}), "bf16", rows, 1).reference_tokens == 0
    assert plan(model, parse(TrainConfig, {"method": {"kind": "orpo"}}), "bf16", rows, 1).reference_bytes == 0


def large_of(model: Model) -> Model:
    return replace(model, shapes=model.shapes | {"more": (1000, 10_000)})


def test_teacher_that_does_not_fit_is_refused_with_a_remedy(model: Model, tmp_path: Path) -> None:
    from forge_ray.store.files import Store
    from forge_ray.train.preflight import Planned, disk_bytes, judge, left_bytes
    from forge_ray.train.stated import Stated

    distil = parse(TrainConfig, {"method": {"kind": "distil", "teacher": "big", "k": 10}})
    rows, store = Stated.of(100, 64), Store(str(tmp_path))
    planned = Planned(model, rows, "base", "rows", large_of(model))
    judgement = judge(distil, store, "bf16", planned, 1, 15_000_000)
    assert "big needs" in judgement.problem
    assert "in each worker while it is asked about the rows, there are 15.0 MB" in judgement.problem
    assert "a smaller model in its place" in judgement.remedy
    assert not judge(distil, store, "bf16", planned, 1, 100_000_000).problem
    asked = judgement.plan
    assert disk_bytes(distil, asked) == asked.disk_bytes + 2 * asked.reference_bytes  # as pieces, and put together
    assert left_bytes(distil, asked) >= asked.reference_bytes


def test_plan_names_what_it_does_not_count(model: Model) -> None:
    on_cpu, on_gpu = (parse(TrainConfig, {"scaling": {"gpus_per_worker": gpus}}) for gpus in (0, 1))
    (line,) = not_counted(model, on_cpu, "bf16")
    assert "up to 40 % of the sum" in line
    assert not not_counted(model, on_cpu, "fp32")
    assert not not_counted(model, on_gpu, "bf16")
