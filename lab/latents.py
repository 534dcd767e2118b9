"""latents: what --latent-dim adds to the training of the autoencoder in cdslm.py.

    python cdslm.py --latent-dim 16     diffuse 16 learned latents per frame in place of the log-mel
"""
import torch
import torch.nn.functional as F

from cdslm import Encoder, autocast, keyed, log_mel, train_part


def bottleneck_loss(model, wave, dtype=torch.float32, kl_weight=1e-3):
    """Loss of the variational bottleneck of an AudioAutoencoder on samples (B, N): log-mel
    reconstruction, and the KL divergence of the latents from a standard normal (Kingma & Welling
    2014). One window of the batch is replaced by silence, which must come back as silence."""
    wave = torch.cat([wave[1:], torch.zeros_like(wave[:1])])
    mel = Encoder.from_mel(model, log_mel(wave))
    with autocast(wave.device, dtype):
        statistics = model.encoder(mel.mT).float()                            # (B, 2 latent_dim, T)
        mean, logvar = statistics.chunk(2, dim=1)
        std = (0.5 * logvar).exp()
        latents = mean + torch.randn_like(mean) * std
        reconstruction = model.unlatent(latents).float().mT                   # (B, T, 80)

    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)
    return F.l1_loss(reconstruction, mel) + kl_weight * kl.mean()


def fit(model, config, corpus, dtype):
    """Train the bottleneck; then give each latent mean 0 and standard deviation 1."""
    def loss_of(wave, dtype):
        return bottleneck_loss(model, wave, dtype)

    train_part(model, loss_of, "bottleneck", 4 * config.decoder_steps, config, corpus, dtype)
    keys = [keyed(config.seed, "latents", i) for i in range(256)]
    mel = torch.from_numpy(corpus.windows("mel", "train", keys, 48))
    with torch.no_grad():
        latents = model.from_mel(mel.to(model.mel_stats.device))              # (256, 48, C)
    mean, std = latents.mean((0, 1)), latents.std((0, 1))
    model.latent_stats.copy_(torch.stack([mean, std]))
