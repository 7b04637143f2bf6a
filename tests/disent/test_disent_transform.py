"""The transform: orthogonal after training under every parametrisation, the identity at the start."""

from __future__ import annotations

import pytest
import torch

from captum_m2ib.disent.transform import TRANSFORMS, ChannelTransform

TRAINABLE = [kind for kind in TRANSFORMS if kind != "none"]


def trained(kind: str, channels: int, steps: int, dtype: torch.dtype = torch.float32) -> ChannelTransform:
    transform = ChannelTransform(channels, kind).to(dtype)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(transform.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        pull = torch.randn(channels, channels, generator=generator, dtype=dtype)
        (transform.weight * pull).sum().backward()
        optimizer.step()
    return transform


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_starts_at_the_identity(kind):
    transform = ChannelTransform(7, kind)
    features = torch.randn(2, 7, 3, 4)
    torch.testing.assert_close(transform(features), features)
    assert transform.orthogonality_error() < 1e-6


@pytest.mark.parametrize("kind", TRAINABLE)
def test_stays_orthogonal_when_it_has_turned_far(kind):
    transform = trained(kind, 96, 60)
    assert float((transform.weight - torch.eye(96)).abs().max().detach()) > 0.3
    assert transform.orthogonality_error() < 1e-5


def test_polish_brings_the_exponential_back():
    transform = trained("matrix_exp", 128, 60)
    skew = transform.parametrizations.weight.original.detach().tril(-1)
    plain = torch.matrix_exp(skew - skew.mT)
    assert transform.orthogonality_error() < 1e-6
    assert float((plain - transform.weight.detach()).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", TRAINABLE)
def test_turns_every_location_alike_and_keeps_lengths(kind):
    transform = trained(kind, 6, 20, torch.float64)
    features = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    turned = transform(features).detach()
    matrix = transform.weight.detach()
    torch.testing.assert_close(turned[1, :, 2, 3], matrix @ features[1, :, 2, 3])
    torch.testing.assert_close(turned.norm(dim=1), features.norm(dim=1))


def test_none_has_nothing_to_train_and_nothing_to_save():
    transform = ChannelTransform(4, "none")
    assert not list(transform.parameters()) and not transform.state_dict()


@pytest.mark.parametrize(("channels", "kind", "name"), [(4, "rotate", "transform"), (0, "cayley", "channels")])
def test_refuses(channels, kind, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ChannelTransform(channels, kind)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_matrix_is_built_once_and_again_when_anything_changes(kind, monkeypatch):
    transform, built = ChannelTransform(5, kind), []
    parametrization = transform.parametrizations.weight
    forward = parametrization.forward
    monkeypatch.setattr(parametrization, "forward", lambda: built.append(None) or forward())
    features = torch.randn(1, 5, 2, 2)
    with torch.no_grad():
        for _ in range(3):
            transform(features)
    assert len(built) == 1
    changes = [
        lambda: transform.parametrizations.weight.original.add_(0.1 * torch.randn(5, 5)),
        lambda: transform.parametrizations.weight.original.data.mul_(1.5),
        lambda: transform.load_state_dict(ChannelTransform(5, kind).state_dict()),
        lambda: transform.double(),
    ]
    for count, change in enumerate(changes, 2):
        with torch.no_grad():
            change()
            found = transform(features.to(transform.parametrizations.weight.original.dtype))
            expected = torch.einsum("cd,ndhw->nchw", forward(), features.to(found.dtype))
        assert len(built) == count
        assert torch.equal(found, expected)
