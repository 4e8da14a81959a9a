"""The report's plots: figures as images whose bytes stand in the page."""

import base64
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from moestro import figures
from moestro.models.files import read_origins
from moestro_services.expertise import ordered_domains
from moestro_services.report.markup import Html, join, tag
from moestro_services.report.story import Story, Told


def picture(figure: Any, description: str) -> Html:
    """`figure` as an inlined vector image; `description` is read to those who cannot see it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        figures.save(figure, path)
        data = base64.b64encode(path.read_bytes()).decode()
    image = tag("img", src=f"data:image/svg+xml;base64,{data}", alt=description).removesuffix("</img>")
    return tag("figure", Html(image))


def held_out(story: Story) -> Html:
    """Held-out loss per domain after every stage."""
    losses = {name: item.result["held_out_loss"] for name, item in story.evaluations.items()}
    if not losses:
        return Html("")
    return picture(figures.held_out_loss(losses), "Held-out loss of every domain after each stage")


def training(story: Story) -> Html:
    """Training losses, one plot per stage that trains."""
    titles = {"seed": "Seed", "branch": "Branches", "tune": "Fine-tuning of the mix"}
    found = {title: story.history(stage) for stage, title in titles.items()}
    return join(
        picture(figures.loss_curves(histories, title=title), f"Training loss over steps: {title}")
        for title, histories in found.items()
        if histories
    )


def reward(story: Story) -> Html:
    """Reward per policy update where there is one, and what else an rl stage logs."""
    histories = list(story.history("rl").values())
    if not histories:
        return Html("")
    steps, pictures = histories[0], []
    if "reward" in steps[0]:
        pictures.append(picture(figures.reward_curve(steps), "Mean reward over policy updates"))
    if figures.PANELS.keys() & steps[0].keys():
        described = "Entropy, divergences, clipping and lengths by policy update"
        pictures.append(picture(figures.policy_panels(steps), described))
    return join(pictures)


def experts(profile: Told) -> Html:
    """Who takes which domain, one heatmap per layer."""
    tensors, domains, origins = _routing(profile)
    counts_LED = np.stack([tensors[f"counts/{domain}"] for domain in domains], axis=-1)
    figure = figures.expert_heatmap(
        counts_LED, domains=domains, origins=origins, title=f"{profile.subject}: which experts take which domain"
    )
    return picture(figure, f"Share of every domain's expert slots per expert and layer after {profile.subject}")


def together(profile: Told) -> Html:
    """Which experts are chosen together, over all domains."""
    tensors, domains, origins = _routing(profile)
    counts_LEE = sum(tensors[f"coactivation/{domain}"] for domain in domains)
    figure = figures.coactivation(counts_LEE, origins=origins, title=f"{profile.subject}: which experts work together")
    return picture(figure, f"Share of an expert's tokens that chose another one too after {profile.subject}")


def _routing(profile: Told) -> tuple[dict[str, Any], list[str], list[list[str]]]:
    assert profile.entry is not None
    tensors = load_file(profile.entry.path / "routing.safetensors")
    origins = read_origins(profile.entry.path)
    names = [name.removeprefix("counts/") for name in tensors if name.startswith("counts/")]
    return tensors, ordered_domains(names, origins), origins
