"""The stages of MT-LLM from settings, each in a folder of its own: tiny models, task, stages 1 to 3, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fused_kd.training.data.prompts import PairDataset
from fused_kd.training.data.reading import sound
from fused_kd.training.data.sources import file_rows, find_file
from fused_kd.training.mt_llm.adaptation import Adaptation, TextPairs, fit_projection, unexplained, variance_of
from fused_kd.training.mt_llm.captions_task import write_task
from fused_kd.training.mt_llm.comparison import BEFORE, classify, retrieve
from fused_kd.training.mt_llm.config import CAPTIONS, MTLLM, Arm
from fused_kd.training.mt_llm.fitting import Pad, Rows, fit
from fused_kd.training.mt_llm.materials import Materials
from fused_kd.training.mt_llm.pretraining import lm_rows, train_mt
from fused_kd.training.mt_llm.stacked import WEIGHTS, load_seq2seq, save_activation_memory
from fused_kd.training.mt_llm.translate import translate
from fused_kd.training.pipeline import Pipeline, Stage
from fused_kd.training.presets import load_model, train_tokenizer
from fused_kd.training.runs import read_json, read_lines, write_json, write_lines
from fused_kd.training.specs import parse_objective
from fused_kd.training.stages import Settings, train_stage

STATES = "states.safetensors"
HELD_OUT = 1000  # at most a tenth of stage 1's text

Made = tuple[list[Stage], dict[str, Any], list[str]]


class Experiment:
    """All stages of the settings in a folder, in an order in which they can be done.

    Args:
        config: what to do.
        folder: where the stages lie; other settings may have theirs in the same one.

    Attributes:
        pipeline: with every stage added. ``evaluations`` maps a seed to the stage of its numbers.
    """

    def __init__(self, config: MTLLM, folder: str | Path) -> None:
        self.config = c = config
        self.pipeline = p = Pipeline(folder)
        data = [] if c.data is None else [Path(c.data).expanduser()]
        self.task_stage = self.mt_stage = self.lm_stage = None
        settings: dict[str, Any]
        if c.task == CAPTIONS:
            settings = {"languages": c.languages, "tests": c.tests, "valid": c.valid, "limit": c.limit}
            self.task_stage = p.add("task", self._write_task, settings, files=data)
        pretraining = {"seed": c.pretraining_seed, "limit": c.limit}
        if not isinstance(c.mt, str):
            settings = {"mt": c.mt, "languages": c.languages, **pretraining}
            self.mt_stage = p.add("mt", self._train_mt, settings, files=data)
        if not isinstance(c.llm, str):
            self.lm_stage = p.add("lm", self._train_lm, {"llm": c.llm, **pretraining}, files=data)
        mt = _made(self.mt_stage, c.mt, mt=c.mt, codes=c.codes)
        llm = _made(self.lm_stage, c.llm, *c.llm_adapters, llm=c.llm, llm_adapters=c.llm_adapters)
        llm[1]["bidirectional"] = c.bidirectional
        task = _made(self.task_stage, c.task, task=c.task)
        text = _made(self.task_stage if c.text is None else None, c.text or c.task, text=c.text)
        run = {"max_length": c.max_length, "dtype": c.dtype, "bf16": c.bf16}
        settings = run | {"beams": c.beams, "max_new_tokens": c.max_new_tokens, "languages": c.languages}
        self.translations = self._add("translations", self._translate, settings, mt, task)
        self.trainings: dict[int, dict[str, Stage]] = {}
        self.evaluations: dict[int, Stage] = {}
        for seed in c.seeds:
            made = self.trainings[seed] = self._trainings(seed, run | {"seed": seed}, mt, llm, task, text)
            settings = run | {"seed": seed, "arms": c.ways, "lora": c.lora, "languages": c.languages}
            after: Made = ([self.translations, *made.values()], {}, [])
            self.evaluations[seed] = self._add(
                f"evaluate.s{seed}", partial(self._evaluate, seed), settings, mt, llm, task, after
            )

    def _trainings(
        self, seed: int, run: dict[str, Any], mt: Made, llm: Made, task: Made, text: Made
    ) -> dict[str, Stage]:
        c, made = self.config, {}
        settings = run | {"fit": c.adapt, "lora": c.lora, "init": c.projection_init, "limit": c.text_limit}
        if c.projection_init == "least_squares":
            settings["rows"] = c.projection_rows
        made["adapt"] = self._add(f"adapt.s{seed}", partial(self._adapt, seed), settings, mt, llm, text)
        settings = run | {"fit": c.task_fit, "lora": c.task_lora}
        made["task"] = self._add(f"task.s{seed}", partial(self._fit_task, seed), settings, llm, task)
        for tuned in (False, True) if c.encoder_baselines else ():
            name = "encoder-tuned" if tuned else "encoder-frozen"
            settings = run | {"fit": c.task_fit, "tuned": tuned}
            made[name] = self._add(f"{name}.s{seed}", partial(self._fit_encoder, seed, tuned), settings, mt, task)
        taught: Made = ([made["task"]], {}, [])
        states = self._add(f"states.s{seed}", partial(self._states, seed, made["task"]), run, taught, llm, task)
        for name, arm in c.ways.items():
            settings = run | {"arm": arm, "fit": c.distil, "lora": c.lora}
            work = partial(self._distil, seed, arm, made["adapt"], states)
            after: Made = ([made["adapt"], states] if arm.adapted else [states], {}, [])
            made[f"distil-{name}"] = self._add(f"distil-{name}.s{seed}", work, settings, mt, llm, task, after)
        return made

    def _add(self, title: str, work: Callable[[Path], None], settings: dict[str, Any], *parts: Made) -> Stage:
        needs = list({stage.name: stage for part in parts for stage in part[0]}.values())
        merged = {key: value for part in parts for key, value in part[1].items()} | settings
        return self.pipeline.add(title, work, merged, needs=needs, files=[file for part in parts for file in part[2]])

    @cached_property
    def materials(self) -> Materials:
        """What the stages read; only once the stages before them are done."""
        c = self.config
        mt, llm = (
            str(name) if stage is None else str(stage.folder / "model")
            for stage, name in ((self.mt_stage, c.mt), (self.lm_stage, c.llm))
        )
        return Materials(c, mt, llm, c.task if self.task_stage is None else self.task_stage.folder)

    def _write_task(self, out: Path) -> None:
        c = self.config
        write_task(out, str(c.data), c.languages, valid=c.valid, tests=c.tests, limit=c.limit)

    def _captions(self) -> list[dict[str, str]]:
        c = self.config
        rows = [row.value for row in sound(file_rows(find_file(Path(str(c.data)).expanduser(), "train"), None))]
        return rows[: c.limit]

    def _train_mt(self, out: Path) -> None:
        c: Any = self.config
        train_mt(out, self._captions(), c.languages, c.mt, c.pretraining_seed)

    def _train_lm(self, out: Path) -> None:
        plan: Any = self.config.llm
        seed, texts = self.config.pretraining_seed, [row["en"] for row in self._captions()]
        tokenizer = train_tokenizer(texts, plan.vocab)
        rows = PairDataset(lm_rows(tokenizer, texts))
        settings = Settings(plan.epochs, plan.learning_rate, batch_size=plan.batch, seed=seed)
        student = lambda: load_model(plan.model, tokenizer, seed)  # noqa: E731
        train_stage(self.pipeline.run, out.name, student, student, parse_objective("sft"), rows, tokenizer, settings)

    def _translate(self, out: Path) -> None:
        import sacrebleu

        c, m = self.config, self.materials
        references = m.items("test.en")[0]
        model: Any = None
        scores = {}
        for language in c.languages:
            path, texts = out / f"{language}.txt", m.items(f"test.{language}")[0]
            if not path.is_file():
                model = load_seq2seq(m.mt, dtype=m.dtype).to(m.device) if model is None else model
                made = translate(
                    model,
                    m.tokenizer("mt"),
                    texts,
                    source=c.code(language),
                    target=c.code("en"),
                    batch_size=c.eval_batch,
                    max_length=c.max_length,
                    max_new_tokens=c.max_new_tokens,
                    num_beams=c.beams,
                )
                write_lines(path, made)
            if len(references) == len(texts):
                scores[language] = round(sacrebleu.corpus_bleu(read_lines(path), [references]).score, 2)
        write_json(out / "bleu.json", scores)

    def _adapt(self, seed: int, out: Path) -> None:
        c, m = self.config, self.materials
        texts = m.texts()
        held = texts[: min(HELD_OUT, max(len(texts) // 10, 2))]
        rows = Rows([{"text": text} for text in texts[len(held) :]])
        pad = Pad({"text": m.pad_id("mt"), "llm": m.pad_id("llm")})
        pairs = TextPairs({"text": partial(m.encode, "mt"), "llm": partial(m.encode, "llm")}, pad)
        stacked = m.stacked(seed).eval()
        target = m.embed(stacked.plain, "llm", held)
        record: dict[str, Any] = {"variance": variance_of(target)}
        if c.projection_init == "least_squares":
            some = Rows(rows.rows[: c.projection_rows])
            record["projection"] = fit_projection(stacked, some, pairs, batch_size=c.eval_batch)
        record["before"] = unexplained(m.embed(stacked, "mt", held), target)
        stacked.save(out / BEFORE, m.mt, m.llm)
        if c.gradient_checkpointing:
            save_activation_memory(stacked)
        module = Adaptation(stacked, record["variance"])
        fit(module, rows, pairs, c.adapt, out, title=f"adapt seed {seed}", seed=seed, bf16=c.bf16)
        record["after"] = unexplained(m.embed(stacked.eval(), "mt", held), target)
        stacked.save(out, m.mt, m.llm)
        write_json(out / "adaptation.json", record)

    def _fit_task(self, seed: int, out: Path) -> None:
        c, m = self.config, self.materials
        pad = Pad({"text": m.pad_id("llm")})
        rows = m.training_rows("llm")
        fit(m.classifier(seed), rows, pad, c.task_fit, out, title=f"task seed {seed}", seed=seed, bf16=c.bf16)

    def _fit_encoder(self, seed: int, tuned: bool, out: Path) -> None:
        c, m = self.config, self.materials
        pad = Pad({"text": m.pad_id("mt")})
        model, rows = m.encoder_classifier(seed, tuned), m.training_rows("mt")
        fit(model, rows, pad, c.task_fit, out, title=f"encoder seed {seed}", seed=seed, bf16=c.bf16)

    def _states(self, seed: int, task: Stage, out: Path) -> None:
        from safetensors.torch import save_file

        m = self.materials
        model = m.classifier(seed, task.folder).eval()
        states = m.embed(model.embedder, "llm", m.items("train")[0])
        save_file({"states": states.contiguous(), "head": model.head.weight.detach().cpu()}, out / STATES)

    def _distil(self, seed: int, arm: Arm, adapt: Stage, states: Stage, out: Path) -> None:
        from safetensors.torch import load_file

        c, m = self.config, self.materials
        made = load_file(states.folder / STATES)
        stacked = m.stacked(seed, adapt.folder / WEIGHTS if arm.adapted else None)
        if c.gradient_checkpointing:
            save_activation_memory(stacked)
        pad = Pad({"text": m.pad_id("mt")})
        rows = m.training_rows("mt", states=made["states"])
        module = m.distillation(stacked, made["head"], arm)
        fit(module, rows, pad, c.distil, out, title=out.name, seed=seed, bf16=c.bf16)

    def _evaluate(self, seed: int, out: Path) -> None:
        made = self.trainings[seed]
        folders = {name: stage.folder for name, stage in made.items()}
        metrics = {
            "accuracy": classify(self.materials, seed, folders, self.translations.folder, out),
            "retrieval": retrieve(self.materials, seed, folders["adapt"]),
            "adaptation": read_json(folders["adapt"] / "adaptation.json"),
            "training": {name: read_json(folder / "training.json") for name, folder in folders.items()},
        }
        write_json(out / "metrics.json", metrics)

    def collect(self) -> dict[str, Any]:
        """For ``metrics.json``: settings, the task's counts, each seed's numbers, and means over seeds.

        The means are of ``balanced`` accuracy and of retrieval@1, ``{system: {language: mean}}``. Seeds that are not
        done are left out.
        """
        done = {s: read_json(stage.folder / "metrics.json") for s, stage in self.evaluations.items() if stage.done}
        accuracy = [
            {system: {k: v["balanced"] for k, v in scores.items()} for system, scores in made["accuracy"].items()}
            for made in done.values()
        ]
        return {
            "config": asdict(self.config),
            "task": read_json(self.materials.task / "task.json"),
            "chance": 1 / len(self.materials.classes),
            "bleu": read_json(self.translations.folder / "bleu.json"),
            "mean": {"accuracy": _mean(accuracy), "retrieval": _mean([made["retrieval"] for made in done.values()])},
            "seeds": {str(seed): made for seed, made in done.items()},
        }


def _made(stage: Stage | None, *names: Any, **settings: Any) -> Made:
    """What a result that reads this depends on: the stage that made it, or its name and the files of that name."""
    return ([stage], {}, []) if stage is not None else ([], settings, [name for name in names if isinstance(name, str)])


def _mean(seeds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        system: {name: sum(seed[system][name] for seed in seeds) / len(seeds) for name in by_language}
        for system, by_language in (seeds[0] if seeds else {}).items()
    }
