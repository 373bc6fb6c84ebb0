"""Networks between latent vectors and images: generators, inference nets, energies of latents."""
