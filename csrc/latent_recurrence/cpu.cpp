#include "latent_recurrence/backward_steps.h"
