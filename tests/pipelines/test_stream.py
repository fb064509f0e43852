"""A film in clips, on one rank or several, is the film in one piece; what is sent is what was foretold."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.distributed as dist
from lockstep import lockstep
from small_methods import DenseScopes

from reattend.attn_processors import DualScopeAttnProcessor, UnsupportedModel, install
from reattend.attn_processors.comm import Comm, RankLost, split_rows
from reattend.attn_processors.ops.scopes import Clip
from reattend.bench.video import working_set
from reattend.pipelines import Cancelled, CancelToken, stream
from reattend.pipelines.stream import PerFrame, bytes_per_step, streamed

EXACT = 1e-5  # fp32, relative to the largest value: the same sums in another order
SETTINGS = {"window": 5, "anchors": 3}


def motion_unet() -> torch.nn.Module:
    return copy.deepcopy(tiny.animatediff().unet)


def inputs(frames: int, size: tuple[int, int] = (5, 6), batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(frames)
    return (
        torch.randn(batch, 4, frames, *size, generator=draw),
        torch.randn(batch, frames, 5, tiny.TEXT_WIDTH, generator=draw),
    )


def call(model, sample, text, own=None, t=900) -> torch.Tensor:
    first, end = own or (0, sample.shape[2])
    with torch.no_grad():
        return model(sample[:, :, first:end], torch.tensor(t), text[:, first:end].flatten(0, 1)).sample


def close(got, want) -> None:
    torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)


def on_ranks(monkeypatch, parts, sample, text, settings, t=900, clip=3) -> tuple[torch.Tensor, list[int], list[int]]:
    """The film made by ranks that own these frames; bytes sent and foretold."""
    monkeypatch.setattr(stream, "split_rows", lambda frames, ranks: list(parts))
    models = [motion_unet() for _ in parts]

    def work(comm: Comm):
        model = models[comm.rank]
        install(model, DualScopeAttnProcessor(**settings))
        with streamed(model, sample.shape[2], clip=clip, comm=comm) as film:
            out = call(model, sample, text, film.own, t)
        return out, comm.sent, bytes_per_step(model, film, sample.shape[-2:], sample.shape[0])

    made = lockstep(len(parts), work)
    return torch.cat([out for out, *_ in made], dim=2), [sent for _, sent, _ in made], made[0][2]


@pytest.fixture(scope="module")
def judged():
    """What the dense judge, in one piece and with the stock norms, makes of a film; each is computed once."""
    kept = {}

    def judge(frames: int, settings: dict, t: float = 900, batch: int = 2) -> torch.Tensor:
        key = frames, tuple(settings.items()), t, batch
        if key not in kept:
            model = motion_unet()
            install(model, DenseScopes(**settings))
            kept[key] = call(model, *inputs(frames, batch=batch), t=t)
        return kept[key]

    return judge


@pytest.mark.parametrize(
    ("clip", "batch"), [(1, 2), (3, 2), (64, 2), (2, 2), (1, 1)]
)  # the last two: the time has as many rows as a clip
def test_one_process_in_clips_makes_the_film_of_the_judge(judged, clip, batch, monkeypatch):
    out, sent, foretold = on_ranks(monkeypatch, [(0, 11)], *inputs(11, batch=batch), SETTINGS, clip=clip)
    close(out, judged(11, SETTINGS, batch=batch))
    assert sent == foretold == [0]


@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        ([(0, 6), (6, 11)], SETTINGS),
        ([(0, 4), (4, 8), (8, 11)], SETTINGS),
        ([(0, 1), (1, 11)], SETTINGS),  # lopsided
        ([(0, 10), (10, 11)], {"window": 3, "anchors": 1}),  # the anchor lies on one rank alone
        ([(0, 2), (2, 3), (3, 5), (5, 11)], {"window": 7, "anchors": 4}),  # windows reach over several ranks
        ([(i, i + 1) for i in range(4)], {"window": 2, "anchors": 2}),  # a frame each
        ([(0, 4), (4, 7)], {"window": 1, "anchors": 0, "token_scale": "log"}),  # nobody needs anybody, but the norms
        ([(0, 4), (4, 7)], {"window": 3, "anchors": 64}),  # all frames are anchors
        ([(0, 4), (4, 7)], {"window": 16, "anchors": 4}),  # the window covers the film: the stock model
    ],
    ids=str,
)
def test_ranks_make_the_film_of_the_judge_and_send_what_was_foretold(judged, parts, settings, monkeypatch):
    frames = parts[-1][1]
    out, sent, foretold = on_ranks(monkeypatch, parts, *inputs(frames), settings)
    close(out, judged(frames, settings))
    assert sent == foretold and min(sent) > 0
    if settings["window"] == 16:
        close(out, call(motion_unet(), *inputs(frames)))


def test_late_steps_and_films_without_guidance_are_the_same_too(judged, monkeypatch):
    parts = [(0, 5), (5, 7)]
    out, *_ = on_ranks(monkeypatch, parts, *inputs(7, batch=1), SETTINGS, t=10)
    close(out, judged(7, SETTINGS, 10, 1))


def test_the_statistics_do_not_depend_on_the_split_by_a_single_bit(monkeypatch):
    seen = []
    plain = stream.film_statistics
    monkeypatch.setattr(stream, "film_statistics", lambda *args: seen.append(plain(*args)) or seen[-1])
    found = []
    for parts in ([(0, 7)], [(0, 3), (3, 7)]):
        seen.clear()
        on_ranks(monkeypatch, parts, *inputs(7), SETTINGS)
        found.append(seen[0])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_text_may_be_made_when_a_clip_needs_it():
    class Text(PerFrame):
        def __init__(self, rows):
            self.rows, self.most = rows, 0

        def take(self, first, end):
            self.most = max(self.most, end - first)
            return self.rows[first:end]

    model, (sample, text) = motion_unet(), inputs(7)
    install(model, "dual-scope", **SETTINGS)
    want = call(model, sample, text)
    late = Text(text.flatten(0, 1))
    with streamed(model, 7, clip=3, comm=Comm()), torch.no_grad():
        close(model(sample, torch.tensor(900), late).sample, want)
    assert late.most == 3


def test_everything_is_put_back_also_after_an_error():
    model, (sample, text) = motion_unet(), inputs(7)
    handle = install(model, "dual-scope", **SETTINGS)
    want = call(model, sample, text)
    problem = "owns frames 0 to 6, but the model was called with 7"
    with pytest.raises(ValueError, match=problem), streamed(model, 6, comm=Comm()):
        call(model, sample, text)
    assert torch.equal(call(model, sample, text), want)
    handle.remove()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_stop_comes_into_force_within_a_step():
    model, token = motion_unet(), CancelToken()
    install(model, "dual-scope", **SETTINGS)
    token.request()
    with pytest.raises(Cancelled), streamed(model, 7, comm=Comm(), cancel=token):
        call(model, *inputs(7))


def test_the_working_set_does_not_grow_with_the_film(monkeypatch):
    model = motion_unet()
    install(model, "dual-scope", **SETTINGS)
    most = {}
    for frames in (32, 128):
        seen = []

        def weigh(forward, args, kwargs, seen=seen):
            seen.append(sum(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
            return forward(*args, **kwargs)

        monkeypatch.setattr(stream, "run_part", weigh)
        with streamed(model, frames, clip=8, comm=Comm()):
            call(model, *inputs(frames, size=(8, 8), batch=1))
        most[frames] = max(seen)
    assert most[128] <= 1.05 * most[32]


def test_the_working_set_grows_once_a_tile_is_a_single_place():
    model, most = motion_unet(), {}
    install(model, "dual-scope", **SETTINGS)
    for frames in (16, 32, 64):  # 2 frames of 16 places are a clip: beyond 32 frames no tile is smaller
        with streamed(model, frames, clip=2, comm=Comm()), working_set() as found:
            call(model, *inputs(frames, size=(4, 4), batch=1))
        most[frames] = found["bytes"]
    assert most[32] <= 1.2 * most[16]  # the windows at both ends see fewer frames
    assert most[64] > 1.3 * most[32]


def test_what_cannot_be_streamed_says_so(unet, animatediff):
    for model, problem in ((unet, "install 'dual-scope' first"), (animatediff, "install 'dual-scope' first")):
        with pytest.raises(ValueError, match=problem), streamed(model, 8):
            pass
    install(unet, "agent")
    with pytest.raises(UnsupportedModel, match="is no AnimateDiff UNet"), streamed(unet, 8):
        pass
    install(animatediff, "dual-scope", layers="^down")
    with pytest.raises(ValueError, match="10 temporal layers carry other attention"), streamed(animatediff, 8):
        pass
    with (
        pytest.raises(ValueError, match="2 frames cannot be split over 3 ranks"),
        streamed(animatediff, 2, comm=Comm(0, 3)),
    ):
        pass


def test_a_rank_that_does_not_answer_is_named_with_the_layer(monkeypatch):
    def fail(self, messages):
        raise RankLost(self._lost([1], OSError("gone")))

    monkeypatch.setattr(Comm, "_exchange", fail)
    model = motion_unet()
    install(model, "dual-scope", **SETTINGS)
    where = r"rank 0 waited in vain for rank 1 of 2 in down_blocks.0.motion_modules.0.norm \(gone\)"
    with pytest.raises(RankLost, match=where), streamed(model, 8, comm=Comm(0, 2)):
        call(model, *inputs(8), own=(0, 4))


def test_the_first_word_of_trouble_reaches_the_other_ranks(tmp_path):
    assert Comm(0, 2).tell("nobody hears") is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert Comm(1, 2).tell("rank 1 on host a: out of memory") == "rank 1 on host a: out of memory"
        said = Comm(0, 2, place="step 3")._lost([1], OSError("connection closed"))
    finally:
        dist.destroy_process_group()
    assert "rank 0 waited in vain for rank 1 of 2 in step 3 (connection closed)" in said
    assert "the first word of trouble: rank 1 on host a: out of memory" in said


def test_bytes_do_not_depend_on_the_length_of_the_film():
    model = motion_unet()
    install(model, "dual-scope", window=5, anchors=4)
    sent = [bytes_per_step(model, Clip(Comm(), tuple(split_rows(frames, 4))), (8, 8), 2) for frames in (64, 6400)]
    norms = 7 * 32 * 2 * 16 * 3  # modules, groups, rows, bytes, other ranks: per own frame
    assert [a - 16 * norms for a in sent[0]] == [b - 1600 * norms for b in sent[1]]
