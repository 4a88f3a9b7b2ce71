"""The folders of jobs: whose they are, over which backbone, and when they go."""

from pathlib import Path

from server.runtime.training_folders import TrainingFolders


def test_a_server_keeps_its_name_and_two_have_two(tmp_path: Path) -> None:
    name = TrainingFolders(tmp_path / "a", "f").runner_name()

    assert TrainingFolders(tmp_path / "a", "g").runner_name() == name
    assert TrainingFolders(tmp_path / "b", "f").runner_name() != name


def test_a_name_that_was_never_written_whole_is_chosen_anew(tmp_path: Path) -> None:
    (tmp_path / "runner").touch()

    assert TrainingFolders(tmp_path, "f").runner_name()


def test_what_was_kept_over_another_backbone_is_no_beginning(tmp_path: Path) -> None:
    TrainingFolders(tmp_path, "a" * 64).of("ftjob-1").mkdir()

    assert not TrainingFolders(tmp_path, "b" * 64).of("ftjob-1").exists()


def test_folders_of_jobs_that_have_ended_are_removed(tmp_path: Path) -> None:
    folders = TrainingFolders(tmp_path, "f" * 64)
    name = folders.runner_name()
    for job in ("ftjob-1", "ftjob-2", "ftjob-3"):
        (folders.of(job) / "inside").mkdir(parents=True)

    folders.remove("ftjob-3")
    folders.sweep({"ftjob-1"})

    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folders.of("ftjob-1")]
    assert folders.runner_name() == name
