"""The commands push-profile and pull-profile: a model's profile to the Hub and back."""

from __future__ import annotations

from pathlib import Path

import click

from hf_cachegen.artifact import Limits
from hf_cachegen.cli_options import access_options, output_options, place_argument
from hf_cachegen.cli_output import bars, print_json, step
from hf_cachegen.cli_views import size_text
from hf_cachegen.stores import Access
from hf_cachegen.stores.card import profile_card
from hf_cachegen.stores.profiles import REPO_TYPE, fetch


@click.command("push-profile", short_help="Put a model's profile on the Hub.")
@click.argument("profile", type=click.Path(path_type=Path))
@click.argument("repo_id", required=False)
@click.option("--revision", help="Branch of the repository.  [default: main]")
@click.option("--public", is_flag=True, help="Make the repository public.")
@click.option("--message", default="Upload a profile", show_default=True, help="Message of the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@output_options
def push_profile(
    profile: Path, repo_id: str | None, revision: str | None, public: bool, message: str, create_pr: bool,
    as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Put a PROFILE (a file, or a folder that holds one) into the repository REPO_ID, with a card, in one commit.

    Without REPO_ID it is <you>/<model>-cachegen-profile, where readers of your artifacts look by themselves, and users
    of a model of yours. A profile that was there stays there, under its digest.
    """
    data, _ = fetch(profile, Access(), Limits())
    from hf_cachegen.profiles.files import Profile
    from hf_cachegen.stores import hub, pushing

    found = Profile.from_bytes(data)
    repo_id = repo_id or pushing.own_repository(found.pin.model)
    pushed = pushing.push_profile(
        data, hub.HubPlace(repo_id, REPO_TYPE, None, revision or hub.DEFAULT_REVISION),
        profile_card(found.about, found.pin, repo_id), private=not public, commit_message=message, create_pr=create_pr,
        progress=bars(as_json),
    )  # fmt: skip
    if as_json:
        print_json({
            "profile": str(profile), "digest": found.digest, "repo_id": repo_id, "url": pushed.url,
            "commit": pushed.commit, "place": pushed.place,
        })  # fmt: skip
    else:
        click.echo(pushed.url)


@click.command("pull-profile", short_help="Copy a profile into a folder.")
@place_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--digest", help="The profile of this digest, of all that were ever in the repository.")
@click.option("--overwrite", is_flag=True, help="Replace another profile that is there.")
@access_options(REPO_TYPE)
@output_options
def pull_profile(
    place: str, out: Path, digest: str | None, overwrite: bool, revision: str | None, repo_type: str,
    subfolder: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Copy the profile at PLACE (a repository "user/name", a URL, a folder) into the folder OUT, such as the model's.
    """
    with step(f"fetching {place}", as_json):
        access = Access(revision=revision, repo_type=repo_type, subfolder=subfolder)
        data, where = fetch(place, access, Limits(), digest)
    from hf_cachegen.profiles.files import Profile, write_file

    found = Profile.from_bytes(data)
    path = write_file(out, data, overwrite=overwrite)
    if as_json:
        print_json({"place": where or place, "profile": str(path), "digest": found.digest, "bytes": len(data)})
    else:
        click.echo(f"{path}: {size_text(len(data))}, digest {found.digest}")
