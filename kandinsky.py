"""Kandinsky 2.2 and 3.0: published schedules, and the pipelines from prompts to images.

Kandinsky            arXiv:2310.03502            2.x: text -> CLIP image embedding -> MoVQ latent -> image
Kandinsky 3          arXiv:2312.03511            text -> T5 states -> MoVQ latent -> image
Dynamic thresholding arXiv:2205.11487  Sec. 2.3  (Imagen)

The networks are in kandinsky_networks.py, their autoencoder in movq.py, the equations in diffusion.py. Both
pipelines have the interface of sampler.py: defaults, T, networks, prepare(prompts), sample_batch(prompts,
seeds, ...). The reference, below, is the published implementation: a seed of it gives the same image here.
"""

from command import BadInput, best_device, to_device

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import diffusion
from data import to_float, to_uint8
from diffusion import SOLVERS, denoiser, from_image, guided, sample_in_batches, seeded_noise
from encoders import (
    check_files,
    check_vocabulary,
    clip_black,
    clip_images,
    clip_length,
    clip_preprocessor,
    clip_texts,
    load_transformer,
    warn_of_cut,
)
from files import folder_hash, read_cached, read_json, save_or_say, text_hash
from kandinsky_networks import load_decoder, load_prior, load_unet3
from lora import load as load_adapter
from movq import build_movq, load_movq
from pixels import padded
from unet import InItsDtype
from weights import check_config, check_kind, fetch, prior_part

# Schedules: a published scheduler_config.json in terms of diffusion.py


@dataclass
class Schedule:
    """The noise schedule of a network, what it predicts, and how its prediction is turned into x_0."""

    alpha_bar: torch.Tensor  # (T,) float64
    prediction: str  # "eps", "x_0" or "v": what the network predicts
    clip: float | None  # x_0 is clamped to [-clip, clip]
    threshold: tuple[float, float] | None  # dynamic thresholding instead: quantile of |x_0|, largest bound
    variance: str  # of ddpm's steps: "small", the posterior's; "large", beta (DDPM, Sec. 3.2); or "learnt"
    spacing: str
    offset: int
    unclip: bool  # published for UnCLIPScheduler, which rounds differently

    def timesteps(self, steps):
        """(steps,) int64, descending; BadInput if the schedule has fewer times."""
        if not 1 <= steps <= len(self.alpha_bar):
            raise BadInput(f"--steps {steps}: expected 1 to {len(self.alpha_bar)}")
        try:
            return diffusion.timesteps(len(self.alpha_bar), steps, self.spacing, self.offset)
        except ValueError as error:  # steps_offset is too large for so many steps
            raise BadInput(f"--steps {steps}: not possible with this schedule ({error})") from None

    def bound(self, x_0):
        """x_0 clamped, dynamically thresholded, or as it is."""
        if self.threshold is not None:
            return dynamic_threshold(x_0, *self.threshold)
        return x_0 if self.clip is None else x_0.clamp(-self.clip, self.clip)


def dynamic_threshold(x_0, quantile, largest):
    """Clamp x_0 to [-s, s] and divide by s, a quantile of |x_0| per image, at least 1 (Imagen, Sec. 2.3)."""
    s = torch.quantile(x_0.flatten(1).abs(), quantile, dim=1).clamp(1, largest)
    s = s.view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s


SCHEDULERS = {  # class of a published schedule: does it clip x_0 by default, its spacing by default
    "DDPMScheduler": (True, "leading"), "DDIMScheduler": (True, "leading"),
    "UnCLIPScheduler": (True, "linspace"), "PNDMScheduler": (False, "leading"),
    **dict.fromkeys(("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
                     "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler",
                     "UniPCMultistepScheduler"), (False, "linspace"))}
OF_SOLVERS = (  # settings of the solver that a schedule was saved with
    "algorithm_type", "corrector_order", "disable_corrector", "euler_at_final", "final_sigmas_type",
    "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final", "predict_x0",
    "predictor_order", "set_alpha_to_one", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order",
    "solver_p", "solver_type", "time_shift_type", "use_beta_sigmas", "use_exponential_sigmas",
    "use_karras_sigmas", "use_lu_lambdas")


def read_schedule(folder):
    """The Schedule of a folder with scheduler_config.json; BadInput for settings that are not supported.

    Whatever solver it was saved with: that is not read, sampler.py has its own.
    """
    path = Path(folder) / "scheduler_config.json"
    config = read_json(path)
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    predictions = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large",
                 "fixed_large_log": "large", "learned_range": "learnt"}
    kind = config.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or kind not in SCHEDULERS:
        raise BadInput(f"{path}: not supported: _class_name={kind!r:.100}, expected one of "
                       f"{', '.join(SCHEDULERS)}")
    unclip, (clips, spacing) = kind == "UnCLIPScheduler", SCHEDULERS[kind]
    if config.get("variance_type", "") is None:  # of a solver that draws no noise
        del config["variance_type"]
    c = check_config(
        config, path, kind,
        defaults={**dict.fromkeys(OF_SOLVERS), "num_train_timesteps": 1000,
                  "beta_schedule": "squaredcos_cap_v2" if unclip else "linear",
                  "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": clips,
                  "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
                  "sample_max_value": 1.0, "variance_type": "fixed_small_log" if unclip else "fixed_small",
                  "timestep_spacing": spacing, "steps_offset": 0},
        allowed={"trained_betas": (None,), "shift_terminal": (None,), "timestep_type": ("discrete",),
                 **dict.fromkeys(("rescale_betas_zero_snr", "use_flow_sigmas", "use_dynamic_shifting"),
                                 (False,))})
    for key, supported in (("beta_schedule", names), ("prediction_type", predictions),
                           ("variance_type", variances),
                           ("timestep_spacing", ("leading", "trailing", "linspace"))):
        if c[key] not in supported:
            raise BadInput(f"{path}: not supported: {key}={c[key]!r}, expected one of {', '.join(supported)}")
    threshold = c["dynamic_thresholding_ratio"], c["sample_max_value"]
    for wrong, expected in ((not 0 < c["beta_start"] <= c["beta_end"] < 1, "0 < beta_start <= beta_end < 1"),
                            (c["clip_sample"] and not c["clip_sample_range"], "clip_sample_range above 0"),
                            (threshold[0] > 1, "dynamic_thresholding_ratio up to 1"),
                            (threshold[1] < 1, "sample_max_value from 1")):
        if wrong:
            raise BadInput(f"{path}: expected {expected}")
    return Schedule(
        alpha_bar=diffusion.schedule(names[c["beta_schedule"]], c["num_train_timesteps"], c["beta_start"],
                                     c["beta_end"]),
        prediction=predictions[c["prediction_type"]],
        clip=c["clip_sample_range"] if c["clip_sample"] else None,
        threshold=threshold if c["thresholding"] else None,
        variance=variances[c["variance_type"]],
        spacing=c["timestep_spacing"], offset=c["steps_offset"], unclip=unclip)


# Sampling: with the reference's rounding, or with the solvers of diffusion.py


def denoiser_of(predict, schedule, alpha_bar, times):
    """diffusion.denoiser with the prediction type, bound and variance of a Schedule."""
    if schedule.variance == "large":  # the upper end of a learnt one
        fixed = predict

        def predict(x_t, t):
            out, _ = fixed(x_t, t)
            return out, torch.ones_like(out)

    times = None if schedule.variance == "small" else times
    return denoiser(predict, alpha_bar, schedule.prediction, schedule.bound, times)


def in_float32(alpha_bar):
    """(beta, alpha_bar) as the reference computes them."""
    beta = (1 - alpha_bar / F.pad(alpha_bar[:-1], (1, 0), value=1)).float()
    return beta, torch.cumprod(1 - beta, dim=0)


def reference_ddpm(predict, schedule, timesteps, x_t, noise):
    """diffusion.ddpm with the reference's float32 rounding, operation by operation.

    In exact arithmetic they are equal. But a network may amplify the last bit of x_T to 1 % of the image, and
    then only this reproduces the image of a seed published elsewhere.
    """
    beta, alpha_bar = in_float32(schedule.alpha_bar)
    denoise = denoiser_of(predict, schedule, alpha_bar, timesteps)
    one = torch.ones(())
    for i, t in enumerate(timesteps.tolist()):
        s = int(timesteps[i + 1]) if i + 1 < len(timesteps) else -1
        a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else one
        x_0, log_variance = denoise(x_t, t)
        # UnCLIPScheduler reads beta from its table if s = t - 1: its last step gives 1.0006 x_0, not x_0.
        beta_t = beta[t] if schedule.unclip and s == t - 1 else 1 - a_t / a_s
        x_t = a_s.sqrt() * beta_t / (1 - a_t) * x_0 + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * x_t
        if s >= 0:
            if log_variance is None:
                sigma = ((1 - a_s) / (1 - a_t) * beta_t).sqrt()
            else:
                sigma = (0.5 * log_variance).exp()
            x_t = x_t + sigma * noise()
    return x_t


def solve(predict, schedule, steps, solver, draw, shape, device, z_init=None, strength=1.0):
    """x_0 of the given shape; draw(*shape) gives x_T, then the noise. solver: of SOLVERS, or "reference".

    Below strength 1 it begins at z_init (1, ...), an image's latent, and x_T noises that: see from_image.
    """
    times = schedule.timesteps(steps)

    def noise():
        return to_device(draw(*shape), device)

    alpha_bar = in_float32(schedule.alpha_bar)[1] if solver == "reference" else schedule.alpha_bar
    x_t, times = from_image(z_init, strength, times, alpha_bar, noise())
    if solver == "reference":
        return reference_ddpm(predict, schedule, times, x_t, noise)
    denoise = denoiser_of(predict, schedule, alpha_bar, times)
    return SOLVERS[solver](denoise, x_t, alpha_bar, times, noise)


def latent_shape(n, height, width, s):
    """Shape of n images' latents as in the reference: sides ceil(pixels / s^2) * s, s MoVQ's factor."""
    return n, 4, math.ceil(height / s**2) * s, math.ceil(width / s**2) * s


@contextlib.contextmanager
def on_device(module, device):
    """`with on_device(module, device):` has its tensors there, afterwards again where they were, uncopied.

    module None: a part that a pipeline was built without. It must not learn inside.
    """
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    home = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = to_device(t.data, device)
        yield
    finally:
        for t, data in zip(tensors, home, strict=True):
            t.data = data


@torch.inference_mode()
def encode_image(movq, img, height, width, device):
    """Latent (1, 4, h, w) of an RGB image that begins a sample of this size, padded to it with black.

    height and width are rounded up as those of the sample (latent_shape).
    """
    h, w = (side * movq.factor for side in latent_shape(1, height, width, movq.factor)[2:])
    pixels = torch.from_numpy(padded(img, w, h)).permute(2, 0, 1)[None]
    with on_device(movq, device):
        return movq.encode(to_float(to_device(pixels, device)))


def decode_one_by_one(movq, z):
    """movq.decode of each latent by itself: a batch takes no more memory than an image."""
    return torch.cat([movq.decode(one) for one in z.split(1)])


def one_image_at_a_time_on_cpu(sample_batch):
    """Float sums depend on the batch size; on a CPU, where batches gain little, compute one by one (ours)."""
    @wraps(sample_batch)
    def sample(self, prompts, seeds, *args, **kwargs):
        if self.device.type != "cpu":
            return sample_batch(self, prompts, seeds, *args, **kwargs)
        pairs = zip(prompts, seeds, strict=True)
        return torch.cat([sample_batch(self, [p], [s], *args, **kwargs) for p, s in pairs])

    return sample


def check_match(folder, what, expected, found):
    """BadInput for a part of a pipeline that belongs to another one."""
    if found != expected:
        raise BadInput(f"{folder}: {what}: expected {expected}, as in the prior, got {found}: they do not "
                       "belong together")


def check_size(flag, size, multiple):
    """BadInput for a side in pixels that is not generated; a pipeline called from Python rounds it up."""
    if size is not None and (size < 1 or size % multiple):
        below = max(size, 0) // multiple * multiple
        nearest = " and ".join(str(s) for s in (below, below + multiple) if s)
        raise BadInput(f"{flag} {size}: expected a multiple of {multiple}; the nearest: {nearest}")


# The pipeline of 2.2


class Kandinsky22:
    """text -> image embedding -> image. embed and decode reproduce the reference; sample has our seeds."""

    defaults = {"steps": 50, "guidance": 4.0, "height": 512, "width": 512, "prior_steps": 25,
                "prior_guidance": None}
    offloaded = None  # the device of offload

    def __init__(self, prior, prior_schedule, text_encoder, tokenizer, image_encoder, decoder,
                 decoder_schedule, movq, image_processor=None):
        self.prior, self.prior_schedule = prior, prior_schedule
        self.text_encoder, self.tokenizer, self.image_encoder = text_encoder, tokenizer, image_encoder
        self.decoder, self.decoder_schedule, self.movq = decoder, decoder_schedule, movq
        self.image_processor = image_processor  # a folder

    @classmethod
    def from_pretrained(cls, prior, decoder=None, prior_lora=None, decoder_lora=None, dtype=torch.float32):
        """prior, decoder: published folders or hub names; None: the folder of both. Adapters: any format.

        MoVQ stays float32.
        """
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

        prior = fetch(prior, dtype)
        decoder = prior if decoder is None else fetch(decoder, dtype)
        check_kind(decoder, "decoder", "combined")
        check_kind(prior, "prior", "combined")
        names = "prior", "text_encoder", "image_encoder", "tokenizer", "scheduler"
        part = {name: prior_part(prior, name) for name in names}
        networks = load_prior(part["prior"], dtype), load_decoder(decoder / "unet", dtype)
        width = networks[0].to_embed.out_features  # of an image embedding
        check_match(decoder, "width of an image embedding", width, networks[1].to_tokens.in_features)
        for network, adapter in zip(networks, (prior_lora, decoder_lora), strict=True):
            if adapter is not None:
                load_adapter(network, adapter)
        text_encoder = load_transformer(CLIPTextModelWithProjection, part["text_encoder"], dtype)
        image_encoder = load_transformer(CLIPVisionModelWithProjection, part["image_encoder"], dtype)
        tokenizer = load_transformer(CLIPTokenizer, part["tokenizer"])
        check_vocabulary(part["tokenizer"], tokenizer, text_encoder)
        check_match(part["text_encoder"], "width", width, text_encoder.config.projection_dim)
        check_match(part["image_encoder"], "width", width, image_encoder.config.projection_dim)
        tokens = networks[0].positions.shape[1] - 4  # beside embedding, time, x and query
        check_match(part["text_encoder"], "number of tokens", tokens, clip_length(text_encoder))
        return cls(networks[0], read_schedule(part["scheduler"]), text_encoder, tokenizer, image_encoder,
                   networks[1], read_schedule(decoder / "scheduler"), load_movq(decoder / "movq"),
                   prior_part(prior, "image_processor"))

    @staticmethod
    def size_multiple(decoder):
        """Sides of images are multiples of so many pixels; decoder: its folder."""
        with torch.device("meta"):
            return build_movq(read_json(decoder / "movq/config.json")).factor**2

    @property
    def device(self):
        """Where it computes."""
        return self.offloaded or self.prior.query.device

    def offload(self, device):
        """Compute on a device that holds only the part which computes; the others stay where they are."""
        self.offloaded = best_device(device)
        return self

    def to(self, device):
        for module in (self.prior, self.text_encoder, self.image_encoder, self.decoder, self.movq):
            module.to(device)
        return self

    @property
    def networks(self):
        """The networks that may carry adapters."""
        return [self.prior, self.decoder]

    @property
    def T(self):
        return min(len(self.prior_schedule.alpha_bar), len(self.decoder_schedule.alpha_bar))

    def prepare(self, prompts, cache=None):
        """Say which prompts are cut; CLIP encodes those of each batch."""
        warn_of_cut(self.tokenizer, sorted(set(prompts)), clip_length(self.text_encoder))

    def encode_text(self, prompts):
        return clip_texts(self.text_encoder, self.tokenizer, prompts)

    def embed(self, prompts, steps=25, guidance=4.0, generator=None, negative_prompt=None):
        """(image embeddings, negative ones), both (b, d), denormalised; the noise is of one generator."""
        draw = partial(torch.randn, generator=generator)
        return self._embed(prompts, steps, guidance, draw, negative_prompt, "reference")

    @torch.inference_mode()
    def _embed(self, prompts, steps, guidance, draw, negative_prompt, solver):
        # A negative prompt gets embeddings from the same run; without one a zero image's is used.
        n, negative = len(prompts), [] if negative_prompt is None else [negative_prompt] * len(prompts)
        texts = [*prompts, *negative]
        with on_device(self.text_encoder, self.device):
            cond, null = (self.encode_text(x) for x in (texts, [negative_prompt or ""] * len(texts)))
        with on_device(self.prior, self.device):
            predict = guided(InItsDtype(self.prior), cond, null, guidance)
            shape = (len(texts), self.prior.clip_mean.shape[-1])
            x_0 = solve(predict, self.prior_schedule, steps, solver, draw, shape, self.device)
            embeds = self.prior.denormalise(x_0)
        if negative:
            return embeds[:n], embeds[n:]
        return embeds, self._black.to(embeds.device).expand_as(embeds)

    @cached_property
    def _black(self):
        with on_device(self.image_encoder, self.device):
            return clip_black(self.image_encoder)

    @torch.inference_mode()
    def embed_image(self, img):
        """CLIP's embedding (1, d) of an RGB image, which can stand for the prior's embedding of a prompt."""
        pixels = clip_preprocessor(self.image_processor)(img)
        with on_device(self.image_encoder, self.device):
            return clip_images(self.image_encoder, pixels[None])

    def encode_image(self, img, height=512, width=512):
        """The z_init of an RGB image, for samples of this size; see the function encode_image."""
        return encode_image(self.movq, img, height, width, self.device)

    def decode(self, image_embeds, negative_image_embeds, steps, guidance, height, width, generator,
               z_init=None, strength=1.0):
        """Images (b, 3, h, w) in about [-1, 1], not clamped; all noise comes from one generator.

        h and w are height and width rounded up to whole latent cells (latent_shape). z_init, strength: see
        sample_batch.
        """
        draw = partial(torch.randn, generator=generator)
        embeds = image_embeds, negative_image_embeds
        return self._decode(*embeds, steps, guidance, height, width, draw, "reference", z_init, strength)

    @torch.inference_mode()
    def _decode(self, image_embeds, negative_image_embeds, steps, guidance, height, width, draw, solver,
                z_init, strength):
        shape = latent_shape(len(image_embeds), height, width, self.movq.factor)

        def eps_and_variance(x_t, t):  # guidance acts on eps only; the variance is the conditional one
            out, cond = predict(x_t, t)  # (b, 8, h, w) each
            return out[:, :4], cond[:, 4:]

        with on_device(self.decoder, self.device):
            predict = guided(InItsDtype(self.decoder), (image_embeds,), (negative_image_embeds,), guidance)
            z = solve(eps_and_variance, self.decoder_schedule, steps, solver, draw, shape, self.device,
                      z_init, strength)
        with on_device(self.movq, self.device):
            return decode_one_by_one(self.movq, z)

    def sample(self, prompts, seed=0, steps=50, guidance=4.0, height=512, width=512, batch_size=16,
               **settings):
        """uint8 (b, 3, h, w); image i depends only on its prompt and seed + i. settings: of sample_batch."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self.prepare([*prompts, settings.get("negative_prompt", "")])
        settings |= {"steps": steps, "guidance": guidance, "height": height, "width": width}
        return sample_in_batches(self.sample_batch, prompts, seed, batch_size, **settings)

    @one_image_at_a_time_on_cpu
    def sample_batch(self, prompts, seeds, steps=50, solver="ddpm", guidance=4.0, negative_prompt="",
                     height=512, width=512, prior_steps=25, prior_guidance=None, z_init=None, strength=1.0,
                     image_embed=None, image_weight=1.0):
        """uint8 (b, 3, h, w) of b prompts and b seeds. steps are the decoder's.

        guidance is the decoder's and, where prior_guidance is None, the prior's. Image to image: the decoder
        begins at z_init, of encode_image. strength 0 gives its reconstruction by MoVQ, 1 the plain sample, in
        which z_init plays no part; there the published pipeline noises the image too.
        Variation: image_embed, of embed_image, takes the place of the share image_weight of the prior's
        embedding, as in the published interpolation. The prior is asked at any weight, so that the decoder's
        noise is always the same.
        """
        draw = seeded_noise(seeds)
        prior_guidance = guidance if prior_guidance is None else prior_guidance
        negative = negative_prompt or None
        embeds, null = self._embed(prompts, prior_steps, prior_guidance, draw, negative, solver)
        if image_embed is not None:
            embeds = (1 - image_weight) * embeds + image_weight * image_embed
        settings = steps, guidance, height, width, draw, solver, z_init, strength
        return to_uint8(self._decode(embeds, null, *settings))


# The pipeline of 3.0


class Kandinsky3:
    """text -> T5 states -> image. generate reproduces the reference; sample has our seeds.

    The text encoder is by far the largest part: it is loaded when it is needed, and sample frees it before
    the U-Net runs.
    """

    n_tokens = 128
    defaults = {"steps": 25, "guidance": 4.0, "height": 1024, "width": 1024}
    offloaded = None  # the device of offload

    def __init__(self, unet, schedule, text_folder, text_dtype, text_device, tokenizer, movq):
        self.unet, self.schedule, self.tokenizer, self.movq = unet, schedule, tokenizer, movq
        self.text_folder, self.text_dtype = text_folder, text_dtype
        self.text_device = text_device and best_device(text_device)
        self.text_encoder, self.texts = None, {}

    @classmethod
    def from_pretrained(cls, folder, lora=None, dtype=torch.float32, text_device=None):
        """A published folder or hub name; lora: an adapter. MoVQ stays float32, T5 is never float16."""
        from transformers import T5Tokenizer

        folder = fetch(folder, dtype)
        check_kind(folder, "3")
        check_files(folder / "text_encoder", is_tokenizer=False)  # it is loaded only when prompts are there
        unet = load_unet3(folder / "unet", dtype)
        if lora is not None:
            load_adapter(unet, lora)
        return cls(unet, read_schedule(folder / "scheduler"), folder / "text_encoder",
                   torch.float32 if dtype == torch.float32 else torch.bfloat16, text_device,
                   load_transformer(T5Tokenizer, folder / "tokenizer"), load_movq(folder / "movq"))

    @staticmethod
    def size_multiple(folder):
        """As of Kandinsky22, whatever the folder holds."""
        return 64

    @property
    def device(self):
        """Where it computes."""
        return self.offloaded or self.unet.conv_in.weight.device

    def offload(self, device):
        """Compute on a device that holds only the part which computes; the others stay where they are.

        The text encoder does not fit whole: its blocks take turns.
        """
        self.offloaded = best_device(device)
        return self

    @property
    def networks(self):
        """The networks that may carry adapters."""
        return [self.unet]

    @property
    def T(self):
        return len(self.schedule.alpha_bar)

    def to(self, device):
        for module in (self.unet, self.movq):
            module.to(device)
        return self

    @torch.inference_mode()
    def encode_text(self, prompts):
        """T5 states of each prompt without padding: a list of (n, d)."""
        from transformers import T5EncoderModel

        device = self.text_device or self.device
        if self.text_encoder is None:
            self.text_encoder = load_transformer(T5EncoderModel, self.text_folder, self.text_dtype)
            check_vocabulary(self.text_folder, self.tokenizer, self.text_encoder)
            if self.offloaded is None:
                self.text_encoder.to(device)
            else:
                t5 = self.text_encoder.encoder
                for part in (t5.embed_tokens, *t5.block, t5.final_layer_norm):
                    part.forward = on_device(part, device)(part.forward)
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.n_tokens,
                                truncation=True, return_tensors="pt").to(device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [s[m.bool()] for s, m in zip(states, tokens.attention_mask, strict=True)]

    def prepare(self, prompts, cache=None, batch_size=16, is_main=True):
        """Add the T5 states of prompts that self.texts lacks, on the CPU; then free the text encoder.

        cache: a folder for a file of the states, named after the text encoder, its dtype and the tokenizer.
        Of several processes the main one writes it, and says which prompts are cut.
        """
        file, kept = None, {}
        new = sorted(set(prompts) - self.texts.keys())
        if is_main:
            warn_of_cut(self.tokenizer, new, self.n_tokens)
        if cache is not None and new:
            folders = self.text_folder, self.tokenizer.name_or_path
            key = text_hash(*map(folder_hash, folders), self.text_dtype)
            file = Path(cache) / f"t5-{key}.safetensors"
            kept, _ = read_cached(file) or ({}, None)
            self.texts |= {p: kept[text_hash(p)] for p in prompts if text_hash(p) in kept}
        missing = sorted(set(prompts) - self.texts.keys())
        if torch.device(self.text_device or self.device).type == "cpu":
            batch_size = 1  # as one_image_at_a_time_on_cpu
        elif self.offloaded:
            batch_size = 128  # for each batch all blocks are copied to the device
        for i in tqdm(range(0, len(missing), batch_size), "T5 states", disable=len(missing) < 100):
            batch = missing[i:i + batch_size]
            self.texts |= {p: states.cpu() for p, states in zip(batch, self.encode_text(batch), strict=True)}
        self.text_encoder = None
        if file is not None and missing and is_main:
            save_or_say(file, kept | {text_hash(p): self.texts[p] for p in missing})

    def encode_image(self, img, height=1024, width=1024):
        """The z_init of an RGB image, for samples of this size; see the function encode_image."""
        return encode_image(self.movq, img, height, width, self.device)

    def generate(self, prompts, steps=25, guidance=4.0, height=1024, width=1024, generator=None,
                 negative_prompt=None, z_init=None, strength=1.0):
        """Images (b, 3, h, w) in about [-1, 1], not clamped; all noise comes from one generator.

        h and w are height and width rounded up to multiples of 64. As in the reference, the texts of a batch
        are cut to its longest plus one and pooled by a mean over that length: an image depends on its batch.
        z_init, strength: see sample_batch.
        """
        texts = self.encode_text(prompts)
        null = None if negative_prompt is None else self.encode_text([negative_prompt])[0]
        draw = partial(torch.randn, generator=generator)
        return self._generate(texts, null, False, steps, guidance, height, width, draw, "reference", z_init,
                              strength)

    @torch.inference_mode()
    def _generate(self, texts, null, own_length, steps, guidance, height, width, draw, solver, z_init,
                  strength):
        nulls = [texts[0][:0] if null is None else null] * len(texts)  # the null condition has no token
        lengths = [[min(len(x) + 1, self.n_tokens) for x in row] for row in (texts, nulls)]
        n = max(lengths[0] + lengths[1]) if own_length else max(lengths[0])
        cond, null = ((*pad_texts(row, n), torch.tensor(length))  # (b, n, d), (b, n), (b,)
                      for row, length in zip((texts, nulls), lengths, strict=True))
        cond, null = ([x.to(self.device) for x in row[:3 if own_length else 2]] for row in (cond, null))
        shape = latent_shape(len(texts), height, width, 8)
        with on_device(self.unet, self.device):
            predict = guided(InItsDtype(self.unet), cond, null, guidance)
            z = solve(predict, self.schedule, steps, solver, draw, shape, self.device, z_init, strength)
        with on_device(self.movq, self.device):
            return decode_one_by_one(self.movq, z)

    def sample(self, prompts, seed=0, steps=25, guidance=4.0, height=1024, width=1024, batch_size=16,
               **settings):
        """uint8 (b, 3, h, w); image i depends only on its prompt and seed + i. settings: of sample_batch.

        To that end the text is pooled over each prompt's own length plus one, not over the batch's (ours).
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        negative = settings.get("negative_prompt")
        self.prepare([*prompts, *([negative] if negative else [])], batch_size=batch_size)
        settings |= {"steps": steps, "guidance": guidance, "height": height, "width": width}
        return sample_in_batches(self.sample_batch, prompts, seed, batch_size, **settings)

    @one_image_at_a_time_on_cpu
    def sample_batch(self, prompts, seeds, steps=25, solver="ddpm", guidance=4.0, negative_prompt="",
                     height=1024, width=1024, z_init=None, strength=1.0):
        """uint8 (b, 3, h, w) of b prompts and b seeds. z_init and strength as in Kandinsky22."""
        self.prepare([*prompts, *([negative_prompt] if negative_prompt else [])], batch_size=len(prompts))
        null = self.texts[negative_prompt] if negative_prompt else None
        texts, draw = [self.texts[p] for p in prompts], seeded_noise(seeds)
        settings = steps, guidance, height, width, draw, solver, z_init, strength
        return to_uint8(self._generate(texts, null, True, *settings))


def pad_texts(texts, n):
    """(states (b, n, d) with zeros at padding, mask (b, n)) of b texts (n_i, d), cut to n tokens."""
    texts = [text[:n] for text in texts]
    mask = torch.arange(n) < torch.tensor([len(text) for text in texts])[:, None]
    return torch.stack([F.pad(text, (0, 0, 0, n - len(text))) for text in texts]), mask
