from __future__ import annotations

import os
import shutil

import pytest
from holding import held_elsewhere

from reattend.pipelines import files
from reattend.pipelines.files import check_writable, free_path, held, hold, written_whole


def test_files_appear_together_at_the_end(tmp_path):
    one, two = tmp_path / "deep" / "one", tmp_path / "deep" / "two"
    with written_whole(one, two) as asides:
        for aside in asides:
            aside.write_text("whole")
        assert not one.exists()
        assert not two.exists()
    assert one.read_text() == two.read_text() == "whole"
    assert len(list(one.parent.iterdir())) == 2


def fail_after(write):
    write("half")
    raise ZeroDivisionError


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "one", tmp_path / "two") as asides:
        fail_after(asides[0].write_text)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, not a folder"):
        check_writable(tmp_path / "file" / "car.png")
    with pytest.raises(ValueError, match="cannot write"), written_whole(tmp_path / "file" / "car.png"):
        pass
    with pytest.raises(ValueError, match="it is a folder"), written_whole(tmp_path):
        pass
    check_writable(tmp_path / "not" / "yet" / "there.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="no permission"):
        check_writable(tmp_path / "car.png")


def test_free_path_names_after_the_text_and_never_takes_a_name_twice(tmp_path):
    first = free_path(tmp_path, "A blue car, on sand! 7", ".png")
    assert first.name == "a-blue-car-on-sand-7.png"
    first.touch()
    assert free_path(tmp_path, "A blue car, on sand! 7", ".png").name == "a-blue-car-on-sand-7-2.png"
    assert free_path(tmp_path, "猫/../..", ".png") == tmp_path / "picture.png"
    (tmp_path / "car-64x64.png").touch()
    assert free_path(tmp_path, "car", ".png", ["-64x64.png"]).name == "car-2.png"
    assert len(free_path(tmp_path, "x" * 500, ".png").stem) == 48


def test_a_folder_is_held_by_one_process_until_it_ends_in_whatever_way(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "a"
    with held_elsewhere(folder):
        with pytest.raises(ValueError, match="another process works in .*; wait for its end, or choose another folder"):
            hold(folder)
        monkeypatch.setattr(files, "fcntl", None)
        hold(folder).close()  # where there are no locks nobody is kept out
        monkeypatch.undo()
    hold(folder).close()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, not a folder"):
        hold(tmp_path / "file" / "a")


def test_a_folder_that_was_held_for_a_block_keeps_what_was_put_there_and_no_lock(tmp_path):
    folder = tmp_path / "film.parts"
    with held(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not folder.exists()
    with held(folder):
        (folder / "step").touch()
    assert [path.name for path in folder.iterdir()] == ["step"]
    with held(folder):
        shutil.rmtree(folder)
    assert not folder.exists()


def test_the_lock_of_another_that_came_in_the_meantime_is_left_alone(tmp_path):
    folder = tmp_path / "film.mp4.parts"
    with held(folder):
        shutil.rmtree(folder)  # as a finished film does
        folder.mkdir()
        (folder / ".lock").touch()  # and the next process takes it
    assert (folder / ".lock").exists()


def test_a_lock_that_was_taken_away_in_between_is_none(tmp_path, monkeypatch):
    plain = files.fcntl.lockf

    def late(file, how):
        (tmp_path / ".lock").unlink()  # as the one that held it does at its end
        plain(file, how)

    monkeypatch.setattr(files.fcntl, "lockf", late)
    with pytest.raises(ValueError, match="another process works in"):
        hold(tmp_path)
    monkeypatch.undo()
    hold(tmp_path).close()
