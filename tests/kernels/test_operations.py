"""The operations as torch sees them: opcheck, gradcheck, torch.compile, errors, and a life without triton."""

import subprocess
import sys

import pytest
import torch

from diffpost.kernels import KERNELS
from diffpost.kernels import convolved_residual as whiten
from diffpost.kernels import group_norm_silu as norm
from diffpost.kernels import pixel_norm_silu as pixel
from diffpost.kernels import ray_shoot as rays
from diffpost.kernels import sde_step as sde

FAST = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def compiled(function):
    """Through Dynamo and AOTAutograd, where a custom operation can go wrong; no C++ compiler needed."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape, dtype=torch.float64, grad=False):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    return drawn


# sde_step ----------------------------------------------------------------------------------------


def step_arguments(draw, dtype, grad=False, guided=True):
    x, score = (draw(2, 1, 3, 5, dtype=dtype, grad=grad) for _ in range(2))
    guidance = draw(2, 1, 3, 5, dtype=dtype, grad=grad) if guided else None
    coefficients = draw(2, 4, dtype=dtype)
    return x, score, guidance, coefficients, torch.tensor([4, 5]), sde.address(1, 2, 3)


@pytest.mark.parametrize("guided", [True, False])
def test_sde_step_passes_opcheck(draw, guided):
    arguments = step_arguments(draw, torch.float32, True, guided)
    torch.library.opcheck(torch.ops.diffpost.sde_step.default, arguments, test_utils=FAST)
    x, _, _, _, ids, address = arguments
    torch.library.opcheck(torch.ops.diffpost.normal_at.default, (x.detach(), ids, address))


def test_sde_step_passes_gradcheck(draw):
    x, score, guidance, *rest = step_arguments(draw, torch.float64, True)
    assert torch.autograd.gradcheck(lambda *t: sde.sde_step(*t, *rest), (x, score, guidance))
    assert torch.autograd.gradcheck(lambda *t: sde.sde_step(*t, None, *rest), (x, score))


def test_sde_step_is_its_reference_eager_and_compiled(draw):
    arguments = step_arguments(draw, torch.float32)
    expected = sde.reference(*arguments)
    assert torch.equal(sde.sde_step(*arguments), expected)
    torch.testing.assert_close(compiled(sde.sde_step)(*arguments), expected, rtol=1e-6, atol=1e-6)


def test_sde_step_compiles_once_for_all_steps(draw):
    """Coefficients and addresses are tensors, so that another step is not another graph."""
    x, score, _, coefficients, ids, _ = step_arguments(draw, torch.float32)
    function = compiled(sde.sde_step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            where = sde.address(9, step)
            got = function(x, score, None, (step + 1) * coefficients, ids, where)
            expected = sde.reference(x, score, None, (step + 1) * coefficients, ids, where)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"score": torch.zeros(2, 4)}, "got score of shape"),
        ({"guidance": torch.zeros(2, 3).double()}, "got guidance"),
        ({"coefficients": torch.zeros(3)}, "got coefficients"),
        ({"ids": torch.zeros(2)}, "got ids"),
        ({"address": torch.zeros(2, dtype=torch.int64)}, "got address"),
    ],
)
def test_sde_step_says_what_is_wrong(change, match):
    given = {
        "x": torch.zeros(2, 3),
        "score": torch.zeros(2, 3),
        "guidance": None,
        "coefficients": torch.zeros(4),
        "ids": torch.tensor([0, 1]),
        "address": sde.address(0, 0),
    }
    sde.sde_step(**given)
    with pytest.raises(ValueError, match=match):
        sde.sde_step(**{**given, **change})


def test_sde_step_has_no_gradient_of_its_coefficients(draw):
    x, score, _, coefficients, ids, where = step_arguments(draw, torch.float32)
    with pytest.raises(ValueError, match="coefficients that require a gradient"):
        sde.sde_step(x, score, None, coefficients.requires_grad_(), ids, where)


@pytest.mark.parametrize("given", [(-1, 0, 0), (1 << 64, 0, 0), (0, 1 << 32, 0), (0, 0, 1 << 15)])
def test_an_address_is_in_range(given):
    with pytest.raises(ValueError, match="expected an integer in"):
        sde.address(*given)


# group_norm_silu ---------------------------------------------------------------------------------


def norm_arguments(draw, dtype, grad=False, residual=True, shift=True):
    x = draw(2, 6, 3, 5, dtype=dtype, grad=grad)
    return (
        x,
        draw(2, 6, 3, 5, dtype=dtype, grad=grad) if residual else None,
        draw(2, 6, dtype=dtype, grad=grad) if shift else None,
        draw(6, dtype=dtype, grad=grad),
        draw(6, dtype=dtype, grad=grad),
        2,
        1e-5,
        0.7 if residual else 1.0,
    )


@pytest.mark.parametrize("full", [True, False])
def test_group_norm_silu_passes_opcheck(draw, full):
    arguments = norm_arguments(draw, torch.float32, True, full, full)
    torch.library.opcheck(torch.ops.diffpost.group_norm_silu.default, arguments, test_utils=FAST)
    x, _, shift, weight, bias, groups, _, scale = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments
    )
    mean = torch.zeros(2, 2)
    backward = (x, x if full else None, x, shift, weight, bias, mean, mean + 1, groups, scale)
    torch.library.opcheck(torch.ops.diffpost.group_norm_silu_backward.default, backward)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_group_norm_silu_passes_gradcheck(draw, residual, shift):
    x, r, t, weight, bias, groups, eps, scale = norm_arguments(
        draw, torch.float64, True, residual, shift
    )

    def function(*tensors):
        given = iter(tensors)
        x, weight, bias = next(given), next(given), next(given)
        extra = {"residual": next(given)} if residual else {}
        extra |= {"shift": next(given)} if shift else {}
        out, total = norm.group_norm_silu(x, weight, bias, groups, eps, scale=scale, **extra)
        return (out, total) if residual else out

    tensors = [a for a in (x, weight, bias, r, t) if a is not None]
    assert torch.autograd.gradcheck(function, tensors)


def test_group_norm_silu_is_its_reference_eager_and_compiled(draw):
    x, r, t, weight, bias, groups, eps, scale = norm_arguments(draw, torch.float32)
    extra = {"residual": r, "shift": t, "scale": scale}
    expected = norm.reference(x, weight, bias, groups, eps, **extra)
    for function in (norm.group_norm_silu, compiled(norm.group_norm_silu)):
        got = function(x, weight, bias, groups, eps, **extra)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_group_norm_silu_is_the_block_of_score_models(draw):
    """GroupNorm_0 after a rescaled skip connection, and GroupNorm_1 after the time embedding."""
    x, h, t, weight, bias, groups, eps, _ = norm_arguments(draw, torch.float32)
    layer = torch.nn.GroupNorm(groups, 6, eps)
    layer.load_state_dict({"weight": weight, "bias": bias})
    total = (x + h) / 1.41421356237
    out, kept = norm.group_norm_silu(
        x, weight, bias, groups, eps, residual=h, scale=1 / 1.41421356237
    )
    torch.testing.assert_close(kept, total)
    torch.testing.assert_close(out, torch.nn.functional.silu(layer(total)))
    out, _ = norm.group_norm_silu(x, weight, bias, groups, eps, shift=t)
    torch.testing.assert_close(out, torch.nn.functional.silu(layer(x + t[..., None, None])))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"groups": 4}, "got 4 groups for 6 channels"),
        ({"x": torch.zeros(2, 6)}, "expected \\(B, C, ...\\)"),
        ({"weight": torch.zeros(5)}, "got weight of shape"),
        ({"shift": torch.zeros(6)}, "got shift of shape"),
        ({"residual": torch.zeros(2, 6, 3)}, "got residual of shape"),
        ({"residual": torch.zeros(2, 6, 3, 3).half()}, "got residual of shape"),
    ],
)
def test_group_norm_silu_says_what_is_wrong(change, match):
    given = {
        "x": torch.zeros(2, 6, 3, 3),
        "weight": torch.zeros(6),
        "bias": torch.zeros(6),
        "groups": 2,
    }
    norm.group_norm_silu(**given)
    with pytest.raises(ValueError, match=match):
        norm.group_norm_silu(**{**given, **change})


# pixel_norm_silu ---------------------------------------------------------------------------------


def pixel_arguments(draw, dtype, grad=False, film=True):
    """x as (B, H, W, C), weight, bias, film."""
    return (
        draw(2, 3, 5, 6, dtype=dtype, grad=grad),
        draw(6, dtype=dtype, grad=grad),
        draw(6, dtype=dtype, grad=grad),
        draw(2, 2, 6, dtype=dtype, grad=grad) if film else None,
    )


@pytest.mark.parametrize("film", [True, False])
def test_pixel_norm_silu_passes_opcheck_and_gradcheck(draw, film):
    arguments = (*pixel_arguments(draw, torch.float32, True, film), 1e-5)
    torch.library.opcheck(torch.ops.diffpost.pixel_norm_silu.default, arguments, test_utils=FAST)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    operation = torch.ops.diffpost.pixel_norm_silu_backward.default
    torch.library.opcheck(operation, (plain[0], *plain))

    x, weight, bias, both = pixel_arguments(draw, torch.float64, True, film)
    images = x.detach().permute(0, 3, 1, 2).requires_grad_()
    tensors = (images, weight, bias, *(() if both is None else both.detach().unbind(1)))
    tensors = tuple(t.detach().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(pixel.pixel_norm_silu, tensors)


def test_pixel_norm_silu_is_what_the_unet_does(draw):
    """Its normalisation with FiLM and SiLU, eager and compiled, and channels-last as it stores features."""
    from diffpost.networks.unet import _PixelNorm

    x = draw(2, 6, 3, 5, dtype=torch.float32).to(memory_format=torch.channels_last)
    layer = _PixelNorm(6, 4)
    for parameter in layer.parameters():
        parameter.data = draw(*parameter.shape, dtype=torch.float32)
    embedding = draw(2, 4, dtype=torch.float32)
    with torch.no_grad():
        gain, shift = layer.film(embedding).chunk(2, dim=-1)
        expected = torch.nn.functional.silu(layer(x, embedding))
        for function in (pixel.pixel_norm_silu, pixel.reference, compiled(pixel.pixel_norm_silu)):
            got = function(x, layer.weight, layer.bias, gain, shift)
            torch.testing.assert_close(got, expected)
            assert got.is_contiguous(memory_format=torch.channels_last)
        plain = torch.nn.functional.silu(layer(x))
        torch.testing.assert_close(pixel.pixel_norm_silu(x, layer.weight, layer.bias), plain)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(2, 6, 3)}, "expected \\(B, C, H, W\\)"),
        ({"x": torch.zeros(2, 3000, 1, 1)}, "at most 2048 channels"),
        ({"weight": torch.zeros(5)}, "got weight"),
        ({"gain": torch.zeros(2, 6)}, "one of gain and shift"),
        ({"gain": torch.zeros(2, 6), "shift": torch.zeros(6)}, "got shift"),
    ],
)
def test_pixel_norm_silu_says_what_is_wrong(change, match):
    given = {"x": torch.zeros(2, 6, 3, 3), "weight": torch.zeros(6), "bias": torch.zeros(6)}
    pixel.pixel_norm_silu(**given)
    with pytest.raises(ValueError, match=match):
        pixel.pixel_norm_silu(**{**given, **change})


# convolved_residual ------------------------------------------------------------------------------


def whitening_arguments(draw, dtype):
    size = (2, 5, 4)
    return (
        torch.view_as_complex(draw(3, *size, 2, dtype=dtype)),
        torch.view_as_complex(draw(*size, 2, dtype=dtype)),
        draw(*size, dtype=dtype).exp(),
        draw(3, dtype=dtype).exp(),
    )


def test_convolved_residual_passes_opcheck_and_gradcheck(draw):
    r, a, q, s = whitening_arguments(draw, torch.float32)
    pairs = [torch.view_as_real(r), torch.view_as_real(a), q, s]
    operation = torch.ops.diffpost.convolved_residual.default
    for conjugate in (False, True):
        leaves = [p.clone().requires_grad_() for p in pairs]
        torch.library.opcheck(operation, (*leaves, conjugate), test_utils=FAST)
    for conjugate in (False, True):
        tensors = [
            torch.view_as_real(t) if t.is_complex() else t
            for t in whitening_arguments(draw, torch.float64)
        ]
        leaves = [t.clone().requires_grad_() for t in tensors]
        # two times where it is linear: the gradient of r is the same operation
        assert torch.autograd.gradcheck(lambda *t, c=conjugate: operation(*t, c), leaves)
        assert torch.autograd.gradgradcheck(
            lambda r, t=tensors, c=conjugate: operation(r, *t[1:], c), leaves[:1]
        )


def test_convolved_residual_is_the_score_of_a_dense_gaussian(draw):
    """Periodic convolution and white noise: conj(a) r/(q + s |a|^2) is A^T (Q + s A A^T)^-1 r."""
    h, w, std = 6, 5, 0.3
    psf = torch.zeros(h, w, dtype=torch.float64)
    psf[:2, :3] = draw(2, 3)
    a = torch.fft.rfft2(psf)
    image = torch.eye(h * w, dtype=torch.float64).reshape(-1, h, w)
    matrix = torch.fft.irfft2(torch.fft.rfft2(image) * a, s=(h, w)).reshape(h * w, h * w).T
    r = draw(2, 1, h, w)
    s = torch.tensor([0.7, 2.0], dtype=torch.float64)
    power = torch.full((1, *a.shape), std**2, dtype=torch.float64)
    white = whiten.convolved_residual(torch.fft.rfft2(r), a[None], power, s)
    got = torch.fft.irfft2(white, s=(h, w))
    for b in range(2):
        covariance = std**2 * torch.eye(h * w, dtype=torch.float64) + s[b] * matrix @ matrix.T
        expected = matrix.T @ torch.linalg.solve(covariance, r[b].flatten())
        torch.testing.assert_close(got[b].flatten(), expected, rtol=1e-10, atol=1e-12)


def test_convolved_residual_is_its_reference_eager_and_compiled(draw):
    arguments = whitening_arguments(draw, torch.float32)
    expected = whiten.reference(*arguments)
    torch.testing.assert_close(whiten.convolved_residual(*arguments), expected)
    pairs = [torch.view_as_real(t) if t.is_complex() else t for t in arguments]
    operation = compiled(lambda *t: torch.ops.diffpost.convolved_residual(*t, False))
    torch.testing.assert_close(operation(*pairs), torch.view_as_real(expected))


@pytest.mark.parametrize(
    ("place", "wrong", "match"),
    [
        (0, torch.zeros(3, 2, 5, 4), "complex64 or complex128"),
        (1, torch.zeros(3, 2, 5, 4, dtype=torch.complex64), "got transfer"),
        (2, torch.zeros(2, 5, 4, dtype=torch.float64), "got power"),
        (3, torch.zeros(2), "got s of shape"),
    ],
)
def test_convolved_residual_says_what_is_wrong(draw, place, wrong, match):
    arguments = list(whitening_arguments(draw, torch.float32))
    arguments[place] = wrong
    with pytest.raises(ValueError, match=match):
        whiten.convolved_residual(*arguments)


# ray_shoot ---------------------------------------------------------------------------------------


def lens_arguments(draw, dtype, grad=False):
    source = draw(2, 2, 7, 6, dtype=dtype, grad=grad)
    params = torch.tensor(
        [[0.03, -0.02, 0.7, 0.4, 1.2, 0.05, -0.03], [0.0, 0.1, 0.97, -2.0, 1.0, 0.0, 0.02]]
    )
    x, y = draw(2, 2, 13, dtype=torch.float64)
    x[0, 0], y[0, 0] = 0.03, -0.02  # a ray onto the centre of the first lens
    setting = rays.setting((0.05, -0.1), 0.25, 0.5, 1e-3, dtype)
    return source, params.to(dtype).requires_grad_(grad), x.to(dtype), y.to(dtype), setting


def test_ray_shoot_passes_opcheck_and_gradcheck(draw):
    arguments = (*lens_arguments(draw, torch.float32, True), True)
    torch.library.opcheck(torch.ops.diffpost.ray_shoot.default, arguments, test_utils=FAST)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    backward = (torch.zeros(2, 2, 13), *plain, True, True)
    torch.library.opcheck(torch.ops.diffpost.ray_shoot_backward.default, backward)
    source, params, x, y, setting = lens_arguments(draw, torch.float64, True)
    for function in (rays.ray_shoot, rays.reference):
        assert torch.autograd.gradcheck(
            lambda s, p, f=function: f(s, p, x, y, setting), (source, params)
        )


def test_ray_shoot_is_its_reference_eager_and_compiled(draw):
    arguments = lens_arguments(draw, torch.float32)
    expected = rays.reference(*arguments)
    torch.testing.assert_close(rays.ray_shoot(*arguments), expected)
    torch.testing.assert_close(compiled(rays.ray_shoot)(*arguments), expected)


@pytest.mark.parametrize("q", [0.6, 0.95, 0.9999, 1.0])
def test_ray_shoot_is_what_the_lens_of_physics_does(draw, q):
    """Images and gradients of diffpost.physics.Lens with caustics' SIE and shear, nearly round ones too."""
    caustics = pytest.importorskip("caustics", reason="pip install caustics")
    from diffpost.physics import Grid, Lens

    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    sie = caustics.SIE(cosmology=cosmology, name="sie", z_l=0.5, z_s=1.0)
    shear = caustics.ExternalShear(
        cosmology=cosmology, name="shear", z_l=0.5, z_s=1.0, x0=0.0, y0=0.0
    )
    mass = caustics.SinglePlane(cosmology, lenses=[sie, shear], name="mass", z_l=0.5, z_s=1.0)
    lens = Lens(mass, Grid((10, 12), pixel=0.3, oversample=2), Grid((8, 7), pixel=0.2))
    assert [name.split(".")[1] for name in lens.parameters] == list(rays.PARAMETERS)
    k, (ny, nx) = lens.image.oversample, lens.image.shape
    x, y = (
        c.reshape(ny, k, nx, k).permute(1, 3, 0, 2).reshape(k * k, ny * nx).double()
        for c in lens.image.fine.coordinates()
    )
    setting = rays.setting(
        lens.source.centre,
        lens.source.pixel,
        lens.image.area / lens.source.area,
        1e-4 * lens.image.fine.pixel,
        torch.float64,
    )
    source = draw(2, 1, 8, 7, grad=True)
    params = torch.tensor([[0.03, -0.02, q, 0.4, 1.2, 0.05, -0.03]], dtype=torch.float64)
    params = params.expand(2, 7).clone().requires_grad_()
    expected = lens.render(source, params)
    got = rays.ray_shoot(source, params, x, y, setting).reshape_as(expected)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    g = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, (source, params), g),
        torch.autograd.grad(expected, (source, params), g),
        strict=True,
    ):
        # caustics' own derivative by q loses digits where the lens is round
        loose = 1e-8 if q < 0.999 else 1e-4
        torch.testing.assert_close(a, b, rtol=loose, atol=loose)


@pytest.mark.parametrize(
    ("place", "wrong", "match"),
    [
        (0, torch.zeros(2, 2, 7), "expected \\(B, C, h, w\\)"),
        (1, torch.zeros(2, 6), "got params"),
        (2, torch.zeros(13), "got x of shape"),
        (3, torch.zeros(2, 12), "got y of shape"),
        (4, torch.zeros(4), "got setting"),
    ],
)
def test_ray_shoot_says_what_is_wrong(draw, place, wrong, match):
    arguments = list(lens_arguments(draw, torch.float32))
    arguments[place] = wrong
    with pytest.raises(ValueError, match=match):
        rays.ray_shoot(*arguments)


def test_ray_shoot_has_no_gradient_of_its_rays(draw):
    source, params, x, y, setting = lens_arguments(draw, torch.float32)
    with pytest.raises(ValueError, match="rays or a setting that require a gradient"):
        rays.ray_shoot(source, params, x.requires_grad_(), y, setting)
    with pytest.raises(ValueError, match="positive"):
        rays.setting((0.0, 0.0), 0.0, 1.0, 1e-3)


# without triton ----------------------------------------------------------------------------------


def test_everything_works_without_triton():
    """The same process without the package: every module imports, and an operation is its reference."""
    code = f"""
import sys
sys.modules["triton"] = None
import importlib, torch
from diffpost.kernels import _cases, _compile, sde_step
for name in {KERNELS!r}:
    importlib.import_module("diffpost.kernels." + name)
x = torch.ones(2, 3)
arguments = (x, x, None, torch.ones(4), torch.tensor([0, 1]), sde_step.address(0, 0))
assert torch.equal(sde_step.sde_step(*arguments), sde_step.reference(*arguments))
try:
    _compile.inspect(_cases.cases()[0], "sm_90")
except ValueError as error:
    assert "needs triton" in str(error)
else:
    raise AssertionError("compiled without triton")
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
