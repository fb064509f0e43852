"""The comparison of long films: every arm makes its film, the reader's word is kept, and a run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import tiny

from reattend.attn_processors import dual_scope
from reattend.emoji_world import films
from reattend.emoji_world.films import ARMS, OURS, compare, main, table
from reattend.emoji_world.read import Found, Reading
from reattend.pipelines.checkpoint import latest, parts_folder
from reattend.pipelines.film import frame_count

CAT = Found("cat", "red", (0.1, 0.1, 0.5, 0.5), 0.9)
DOG = Found("dog", "blue", (0.5, 0.5, 0.9, 0.9), 0.9)
SETTINGS = {"frames": 20, "peer_frames": 18, "steps": 1, "prompts": ["a red cat on sand"]}


@pytest.fixture(scope="module")
def model():
    return tiny.fresh(tiny.animatediff())


@pytest.fixture
def reader(monkeypatch):
    """The reader sees the cat, and from the 19th frame of a film on a dog; it has looked at `seen` frames."""
    seen = []

    def look(frame):
        assert frame.shape == (32, 32, 3)
        seen.append(frame)
        return Reading("sand", (CAT,) if len(seen) < 19 else (DOG,))

    monkeypatch.setattr(films, "read", look)
    return seen


def test_every_arm_makes_its_film_and_a_run_goes_on_where_it_was(model, reader, tmp_path, monkeypatch):
    told = []
    first = compare(model, out=tmp_path, **SETTINGS, arms=ARMS[:1], on_progress=lambda *progress: told.append(progress))
    ours = first["arms"][OURS]
    assert ours["counts"] == {"kept_in_first": [17, 17], "kept_in_all": [17, 19]} and ours["first"] == [["red cat"]]
    assert ours["alike"].startswith("90.0 %") and table(first).endswith(
        "keeps 17 of 19 frames as the first (goal: 95%): MISSED"
    )
    assert ours["frames"] == 20 and ours["seconds"] > 0 and ours["travelled"] == 0
    assert (f"{OURS}, step", 1, 1) in told and (f"{OURS}, reading frame", 20, 20) in told
    with pytest.raises(ValueError, match="other settings"):
        compare(model, out=tmp_path, **SETTINGS)  # other arms
    (tmp_path / "results.jsonl").unlink()
    monkeypatch.setattr(films, "long_video", None)  # the film itself is there and is not made again
    noted = json.loads((tmp_path / "dual-scope-1.made.json").read_text())
    assert noted["seconds"] == ours["seconds"] and noted["of"]["attention"][0]["schedule"]
    reader.clear()
    whole = compare(model, out=tmp_path, **SETTINGS)
    assert whole["arms"][OURS]["counts"] == ours["counts"] and whole["arms"][OURS]["seconds"] == ours["seconds"]
    for arm, name, count in zip(ARMS, ("dual-scope", "freenoise", "independent-clips"), (20, 18, 18), strict=True):
        assert whole["arms"][arm]["frames"] == count == frame_count(tmp_path / f"{name}-1.mp4")
        assert (tmp_path / f"{name}-1.png").exists()
    assert len(reader) == 20 + 18 + 18
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # interrupted
    assert compare(model, out=tmp_path, **SETTINGS)["arms"][OURS] == whole["arms"][OURS]
    assert len(reader) == 20 + 2 * 18 + 18
    assert json.loads((tmp_path / "summary.json").read_text())["about"]["pipeline"] == "AnimateDiffPipeline"
    assert not model.free_noise_enabled


def test_films_differ_between_arms_and_clips_begin_with_our_noise(model, reader, tmp_path):
    compare(model, out=tmp_path, **SETTINGS | {"frames": 18})
    assert len(reader) == 3 * 18
    ours, peer, clips = (reader[i * 18 : (i + 1) * 18] for i in range(3))
    assert abs(ours[3].astype(int) - peer[3]).mean() > 1  # another noise
    assert abs(ours[17].astype(int) - clips[17]).mean() < abs(ours[17].astype(int) - peer[17]).mean()


def test_a_film_that_was_stopped_goes_on_and_tells_no_time(model, reader, tmp_path, monkeypatch):
    settings = SETTINGS | {"steps": 2, "frames": 18, "arms": [OURS]}
    plain = films.long_video
    monkeypatch.setattr(films, "long_video", lambda *args, **more: plain(*args, **more, save_every=0))

    def interrupt(arm, done, total):
        if arm == f"{OURS}, step" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(model, out=tmp_path, **settings, on_progress=interrupt)
    assert latest(parts_folder(tmp_path / "dual-scope-1.mp4")).step == 1
    made = compare(model, out=tmp_path, **settings)
    assert made["arms"][OURS]["seconds"] is None and len(reader) == 18
    assert "| dual-scope | 18 | red cat |" in table(made)


def test_a_film_of_other_weights_is_made_anew(reader, tmp_path, monkeypatch):
    model = tiny.fresh(tiny.animatediff())
    settings = SETTINGS | {"frames": 18, "arms": ARMS[2:]}
    made, plain = [], films._clips
    monkeypatch.setattr(films, "_clips", lambda *args: made.append(args) or plain(*args))
    for weight, count in ((0.0, 1), (0.0, 1), (0.5, 2)):
        next(model.unet.parameters()).data += weight
        (tmp_path / "results.jsonl").unlink(missing_ok=True)
        compare(model, out=tmp_path, **settings)
        assert len(made) == count
        assert (tmp_path / "independent-clips-1.made.json").exists()


def test_our_attention_can_have_other_settings_in_another_folder(model, reader, tmp_path, monkeypatch):
    settings = SETTINGS | {"frames": 18, "arms": [OURS]}
    asked, plain = [], films.long_video
    monkeypatch.setattr(
        films, "long_video", lambda recipe, *args, **more: asked.append(recipe) or plain(recipe, *args, **more)
    )
    compare(model, out=tmp_path, **settings, attention=[{"name": "dual-scope", "anchors": "3"}])
    assert asked[0].attention[0]["anchors"] == 3
    with pytest.raises(ValueError, match="other settings .attention differ"):
        compare(model, out=tmp_path, **settings)
    monkeypatch.setattr(dual_scope, "PHASES", (dual_scope.ScopePhase(window=1.0),))  # another version's default
    with pytest.raises(ValueError, match="other settings .attention differ"):
        compare(model, out=tmp_path, **settings, attention=[{"name": "dual-scope", "anchors": 3}])
    with pytest.raises(SystemExit, match="no setting 'ancors'"):
        main(out=tmp_path / "other", attention=(("dual-scope", "ancors=8"),))
    assert not (tmp_path / "other").exists()


def test_bad_requests_and_the_table_of_a_file(model, tmp_path, capsys):
    with pytest.raises(ValueError, match="there is no arm 'fast'; there are dual-scope, FreeNoise, independent clips"):
        compare(model, out=tmp_path, arms=["fast"])
    with pytest.raises(ValueError, match="2 to 10 frames to compare; got 1 prompts and 512 frames"):
        compare(model, out=tmp_path, frames=10)
    with pytest.raises(ValueError, match="got 0 prompts"):
        compare(model, out=tmp_path, prompts=[])
    assert list(tmp_path.iterdir()) == []
    kept = {
        "frames": 20,
        "first": [["red cat"], []],
        "kept_in_first": "95.0 %",
        "kept_in_all": "90.0 %",
        "alike": "91.0 %",
    }
    kept["counts"] = {"kept_in_all": [19, 20]}
    summary = {"settings": {"peer_frames": 18}, "arms": {OURS: {**kept, "travelled": 0.5, "seconds": 30.0}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    main(show=tmp_path / "summary.json")
    said = capsys.readouterr().out
    assert (
        "| dual-scope | 20 | red cat; nothing | 95.0 % | 90.0 % | 91.0 % | 0.5 | 1.50 |" in said
        and "(goal: 95%): met" in said
        and "first 18" in said
    )
    with pytest.raises(SystemExit, match="holds no summary of films"):
        main(show=tmp_path / "other.json")


def test_what_was_read_is_what_is_judged():
    entry = {"readings": [[asdict(CAT)], [asdict(CAT)], [asdict(DOG)], []]}
    found = films._judged(json.loads(json.dumps(entry)))
    assert (found.kept.right, found.kept.asked) == (1, 3) and films._judged(entry, 2).kept.right == 1
