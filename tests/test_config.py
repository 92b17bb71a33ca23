from __future__ import annotations

from pathlib import Path

import pytest

from skinsynth import config
from skinsynth.errors import UserError
from skinsynth.knobs import Arm, Config, GeneratedClass, Phase

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "again.yaml") == loaded


def test_production_configuration_has_the_studys_settings() -> None:
    cfg = config.load("configs/isic2020-sd15.yaml")
    assert (cfg.model.base, cfg.prepare.size) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512)
    assert {(c.instance.count, c.class_.count) for c in cfg.finetune.concepts.values()} == {(25, 250)}
    classify = cfg.classify
    assert (classify.model, classify.lr, classify.global_batch, classify.weight_decay) == ("google/vit-base-patch16-224-in21k", 2e-5, 32, 0.01)
    assert (classify.schedule, classify.warmup_steps > 0) == ("linear", True)


def test_override_reaches_the_key_and_class_is_spelt_class() -> None:
    cfg = config.load("configs/demo.yaml", ["finetune.steps=7", "finetune.concepts.nevus.class.count=3", "run=runs/mine"])
    assert (cfg.finetune.steps, cfg.finetune.concepts["nevus"].class_.count, cfg.run) == (7, 3, "runs/mine")
    assert config.flat(cfg)["finetune.concepts.nevus.class.count"] == 3


@pytest.mark.parametrize(("override", "words"), [
    ("finetune.stepps=3", ["unknown key 'finetune.stepps'", "did you mean 'finetune.steps'"]),
    ("generte.steps=3", ["unknown key 'generte'", "'generate'"]),
    ("finetune.steps=many", ["finetune.steps", "'many'", "Integer"]),
    ("prepare.crop=lesoin", ["prepare.crop is 'lesoin'", "did you mean lesion"]),
    ("prepare.size=4", ["prepare.size is 4", "16 to 2048"]),
    ("finetune.lr=-1", ["finetune.lr is -1", "0 or more"]),
    ("classify.arms.hybrid.sources.synthetic=0.0004", ["classify.arms.hybrid.sources", "0.0004", "leave it out, or raise its weight"]),
    ("classify.arms.hybrid.sources.sythetic=1", ["classify.arms.hybrid.sources", "sythetic"]),
    ("finetune.concepts.melanoma.class.cuont=3", ["finetune.concepts.melanoma.class.cuont"]),
    ("cluster=slrum", ["cluster=slrum", "local"]),
    ("finetune.steps", ["not of the form key=value"]),
    ("finetune.micro_batch=5", ["finetune.global_batch=16", "micro_batch=5"]),
])
def test_bad_values_name_the_key_and_the_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load("configs/demo.yaml", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("path", [path for path in CONFIGS if "isic2020/duplicates.csv" in path.read_text()], ids=lambda path: path.stem)
def test_how_the_list_of_duplicates_is_fetched_stands_where_it_is_asked_for(path: Path) -> None:
    command = "curl -fo isic2020/duplicates.csv https://isic-challenge-data.s3.amazonaws.com/2020/ISIC_2020_Training_Duplicates.csv\n"
    assert command in path.read_text()
    assert command in (path.parent.parent / "README.md").read_text()


def test_names_that_are_no_folders_are_refused() -> None:
    for name in ("a/b", "..", ".hidden", "it's", "two words", "-x", "", "a\n", "$(rm)"):
        for section, one in (("arms", {"sources": {"real": 1}}), ("classes", {"count": 0})):
            cfg = config.load("configs/demo.yaml")
            if section == "arms":
                cfg.classify.arms[name] = Arm(**one)  # type: ignore[arg-type]
            else:
                cfg.generate.classes[name] = GeneratedClass(**one)  # type: ignore[arg-type]
            with pytest.raises(UserError, match=rf"{section}: .* cannot be a name: letters, digits"):
                config.check(cfg)
    cfg.classify.arms = {"half-0.5_synthetic.v2": Arm({"real": 1.0}), "Hälfte": Arm({"real": 1.0})}
    cfg.generate.classes = {}
    config.check(cfg)


def test_a_phase_that_rounding_leaves_no_step_is_refused() -> None:
    cfg = config.load("configs/demo.yaml")
    cfg.classify.arms["staged"] = Arm(phases=[Phase({"real": 1.0}) for _ in range(5)])
    for steps, fits in ((3, False), (4, False), (5, True), (1000, True)):
        cfg.classify.steps = steps
        if fits:
            config.check(cfg)
        else:
            with pytest.raises(UserError, match=r"staged.phases\[\d\].share=1.0 of classify.steps=\d is no step at all"):
                config.check(cfg)


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml does not exist"):
        config.load(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: }")
    with pytest.raises(UserError, match=r"bad.yaml is not valid YAML"):
        config.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="expected 'key: value'"):
        config.load(tmp_path / "list.yaml")
    with pytest.raises(UserError, match=r"is a folder: give a YAML file$"):
        config.load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=f"is a folder: give a YAML file, such as {tmp_path}/config.yaml"):
        config.load(tmp_path)


@pytest.mark.parametrize(("text", "told"), [
    ("finetune: 3", "finetune is a section, of which keys can be set, not 3: give one of them (finetune.steps), or leave it out"),
    ("finetune:\n  # steps: 3", "finetune is a section, of which keys can be set, not null"), ("data: [1]", "data is a section"),
    ("run:", "run cannot be null: give it a value, or leave it out"),
    ("classify: {arms: {a: {sources: }}}", "classify.arms.a.sources cannot be null")])
def test_a_value_for_a_section_and_none_for_a_key_are_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(tmp_path / "mine.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: {told}")


def test_difference_leaves_out_what_changes_no_result() -> None:
    one, other = Config(), Config(run="elsewhere")
    other.cluster.cores = 5
    other.prepare.max_bad = 0.5  # whether to go on, not what comes out: the refusal says "raise prepare.max_bad"
    assert config.difference(one, other) == []
    other.finetune.steps = 17
    assert config.difference(one, other) == ["finetune.steps: 17 -> 1000"]


def test_a_cluster_file_and_single_keys_of_it_go_together() -> None:
    for order in (["cluster=slurm", "cluster.partition=gpu"], ["cluster.partition=gpu", "cluster=slurm"]):
        cluster = config.load("configs/demo.yaml", order).cluster
        assert (cluster.kind, cluster.partition) == ("slurm", "gpu")
        assert cluster.of("finetune").nodes == 2


def test_another_cluster_takes_the_place_of_the_whole_one(tmp_path: Path) -> None:
    """As where a run's own configuration is launched elsewhere: nothing of the first site's partition or memory may be asked for there."""
    first = config.load("configs/demo.yaml", ["cluster=slurm", "cluster.partition=gpu", "cluster.stages.finetune.mem_gb=77"])
    (tmp_path / "again.yaml").write_text(config.dump(first))
    (tmp_path / "site.yaml").write_text("kind: slurm\naccount: mine\nstages:\n  generate: {array: 3}\n")
    items = ["cluster.qos=high", f"cluster={tmp_path / 'site.yaml'}", "cluster.stages.generate.minutes=7"]  # in any order
    cluster = config.load(tmp_path / "again.yaml", items).cluster
    assert (cluster.kind, cluster.account, cluster.partition, cluster.qos) == ("slurm", "mine", None, "high")
    assert set(cluster.stages) == {"generate"}
    assert (cluster.of("generate").array, cluster.of("generate").minutes, cluster.of("finetune").mem_gb) == (3, 7, None)
    assert config.load(tmp_path / "again.yaml", ["cluster=local"]).cluster == config.load("configs/demo.yaml", ["cluster=local"]).cluster
    kept = config.load(tmp_path / "again.yaml", ["cluster.qos=high"]).cluster
    assert (kept.partition, kept.qos, kept.of("finetune").mem_gb) == ("gpu", "high", 77), "a single key leaves the others"


@pytest.mark.parametrize(("override", "words"), [
    ("data.images=${oc.env:SKINSYNTH_NOT_SET}/x", ["data.images", "SKINSYNTH_NOT_SET"]),
    ("data.images=${nowhere}", ["data.images", "nowhere"]),
    ("classify.seeds[0]=3", ["another kind", "classify.seeds=[0,1,2]"]),
    ("classify.arms=[a]", ["another kind", "sections as sections"]),
    ("classify.arms.x.sources={real: .inf}", ["classify.arms.x.sources.real is inf", "expected a finite number"]),
    ("classify.arms.x.sources={real: .nan}", ["classify.arms.x.sources.real is nan", "expected a finite number"]),
    ("classify.arms.x.phases=[{sources: {real: 1}, share: .inf}]", ["classify.arms.x.phases[0].share is inf", "expected a finite number"]),
    ("finetune.lr=.inf", ["finetune.lr is inf", "expected a finite number"]),
    ("screen.max_kid_ratio=.nan", ["screen.max_kid_ratio is nan", "expected a finite number"]),
    ("data.name=a/b", ["data.name='a/b' cannot be"]),
    ("data.name=..", ["data.name='..' cannot be"]),
])
def test_what_stands_for_nothing_or_for_no_number_is_told(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load("configs/demo.yaml", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("overrides", "words"), [
    (["screen.copy_least=0.8"], "screen.copy_least=0.8 is above screen.copy_most=0.75"),
    (["finetune.optimizer=adamw8bit", "finetune.zero=0", "finetune.ema_decay=0.9"], "finetune.optimizer=adamw8bit keeps no moving average"),
    (["screen.max_kid_ratio=3", "screen.kid_subsets=1"], "screen.max_kid_ratio=3.0 needs screen.kid_subsets=2 or more"),
    (["classify.patch=7"], "classify.patch=7 does not divide the image side of 64 pixels: choose another patch, or classify.image_size"),
    (["classify.patch=16", "classify.image_size=72"], "classify.patch=16 does not divide the image side of 72 pixels"),
    (["generate.classes.malignant.target=2"], "generate.classes.malignant.target is 2, expected 0 to 1"),
    (["cluster.stages.classify.tasks_per_node=4", "cluster.stages.classify.gpus_per_node=2"],
     "cluster.stages.classify has tasks_per_node=4 and gpus_per_node=2: each rank of a training needs a GPU of its own"),
])
def test_what_does_not_go_together_is_told(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.load("configs/demo.yaml", overrides)


@pytest.mark.parametrize(("item", "told"), [
    ("cluster.stages.generate.minutes=2:00:00", "to the base of 8 or 60"), ("cluster.account=0123", """for example 'cluster.account="0123"'"""),
    ("finetune.steps", "is not of the form key=value")])
def test_what_yaml_would_take_for_another_number_is_told(item: str, told: str) -> None:
    """An account of digits would be another one, and two hours 7,200 minutes."""
    with pytest.raises(UserError) as caught:
        config.load("configs/demo.yaml", ["cluster=slurm", item])
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"'{item}'"), "it is not the file's fault"


def test_words_that_only_look_so_are_taken() -> None:
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", 'cluster.account="0123"', "run=runs/08", 'cluster.extra={begin: "20:30:00"}', "seed=0"])
    assert (cfg.cluster.account, cfg.run, cfg.cluster.extra, cfg.seed) == ("0123", "runs/08", {"begin": "20:30:00"}, 0)


def test_a_mapping_on_the_command_line_is_the_whole_of_what_a_user_named() -> None:
    """Not more of what was there: another experiment would run without a word."""
    def demo(*items: str) -> Config:
        return config.load("configs/demo.yaml", list(items))

    assert demo("classify.arms.baseline.sources={synthetic: 1}").classify.arms["baseline"].sources == {"synthetic": 1}
    assert list(demo("classify.arms={only: {sources: {real: 1}}}").classify.arms) == ["only"]
    assert demo("classify.arms={}").classify.arms == {}
    assert list(demo("classify.arms={}", "classify.arms.x.sources.real=1").classify.arms) == ["x"]
    name = next(iter(demo().finetune.concepts))
    for item in ("instance.where={diagnosis: melanoma}", "instance={where: {diagnosis: melanoma}}"):
        assert demo(f"finetune.concepts.{name}.{item}").finetune.concepts[name].instance.where == {"diagnosis": "melanoma"}
    for item in ("class={where: {site: torso}}", "class.where={site: torso}"):
        cls = demo(f"finetune.concepts.{name}.{item}").finetune.concepts[name].class_
        assert cls is not None
        assert cls.where == {"site": "torso"}
    only = demo("generate.classes={only: {target: 0, count: 3, prompts: [a]}}").generate.classes
    assert list(only) == ["only"]
    phases = "classify.arms.hybrid={phases: [{sources: {real: 1}, share: 1}]}"  # an arm has either, so none of its sources may stay
    assert demo(phases).classify.arms["hybrid"].sources == {}
    assert list(demo("classify.arms.hybrid=null").classify.arms) == ["baseline"]
    split = demo("prepare.split={train: 0.5}").prepare.split  # a section keeps its other keys
    assert (split.train, split.val) == (0.5, demo().prepare.split.val)
    assert demo("data.metadata=null").data.metadata is None
    assert demo("classify.arms.hybrid.sources.real=3", "classify.arms.hybrid.sources={real: 1}").classify.arms["hybrid"].sources == {"real": 1}
    with pytest.raises(UserError, match=r"classify\.arms\.hybri=null takes out what is not there; there are baseline, hybrid"):
        demo("classify.arms.hybri=null")


def test_what_cannot_be_read_on_the_command_line_is_not_blamed_on_the_file() -> None:
    with pytest.raises(UserError, match=r"command line: 'generate\.classes\.benign\.prompts=\[a \{diag\}\]' cannot be read as YAML") as caught:
        config.load("configs/demo.yaml", ["generate.classes.benign.prompts=[a {diag}]"])
    assert "demo.yaml" not in str(caught.value)


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-somebody")
    cfg = config.load("configs/demo.yaml", ["run=~/runs/a", "data.shards=~/shards", "data.name=a~"])
    assert (cfg.run, cfg.data.shards, cfg.data.name) == ("/home/of-somebody/runs/a", "/home/of-somebody/shards", "a~")
