"""latents: --latent-dim, an autoencoder whose frames are learned.

    python cdslm.py --latent-dim 16     diffuse 16 learned latents per frame in place of the log-mel
"""
import torch
import torch.nn.functional as F

from cdslm import MELS, AudioAutoencoder, autocast, convnext, keyed, log_mel, train_part


class LatentAutoencoder(AudioAutoencoder):
    """An AudioAutoencoder whose frames (B, T, C) are the C latents of a small variational
    autoencoder (Kingma & Welling 2014) on log-mel, each with mean 0 and standard deviation 1."""

    def __init__(self, latent_dim, decoder="neural"):
        super().__init__(decoder)
        self.latent_stats = self.latent_stats[:, None].repeat(1, latent_dim)
        self.encoder = convnext(MELS, 2 * latent_dim, blocks=2)
        self.unlatent = convnext(latent_dim, MELS, blocks=2)

    def from_mel(self, mel):
        """(B, T, 80) log-mel -> (B, T, C) frames."""
        statistics = self.encoder(super().from_mel(mel).mT).mT                # (B, T, 2 C)
        mean, _ = statistics.chunk(2, dim=-1)
        return (mean - self.latent_stats[0]) / self.latent_stats[1]

    def to_mel(self, frames):
        """(B, T, C) frames -> (B, T, 80) normalised log-mel."""
        latents = frames * self.latent_stats[1] + self.latent_stats[0]
        return self.unlatent(latents.mT).mT

    def bottleneck_loss(self, wave, dtype=torch.float32, kl_weight=1e-3):
        """Loss on samples (B, N): log-mel reconstruction, and the KL divergence of the latents from
        a standard normal. One window of the batch is replaced by silence, which must come back as
        silence."""
        wave = torch.cat([wave[1:], torch.zeros_like(wave[:1])])
        mel = super().from_mel(log_mel(wave))
        with autocast(wave.device, dtype):
            statistics = self.encoder(mel.mT).float()                         # (B, 2 C, T)
            mean, logvar = statistics.chunk(2, dim=1)
            std = (0.5 * logvar).exp()
            latents = mean + torch.randn_like(mean) * std
            reconstruction = self.unlatent(latents).float().mT                # (B, T, 80)

        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)
        return F.l1_loss(reconstruction, mel) + kl_weight * kl.mean()

    def fit(self, config, corpus, dtype):
        """Train the latents; then give each mean 0 and standard deviation 1."""
        train_part(self, self.bottleneck_loss, "bottleneck", 4 * config.decoder_steps, config,
                   corpus, dtype)
        keys = [keyed(config.seed, "latents", i) for i in range(256)]
        mel = torch.from_numpy(corpus.windows("mel", "train", keys, 48))
        with torch.no_grad():
            latents = self.from_mel(mel.to(self.mel_stats.device))            # (256, 48, C)
        mean, std = latents.mean((0, 1)), latents.std((0, 1))
        self.latent_stats.copy_(torch.stack([mean, std]))
