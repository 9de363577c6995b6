#include "token_learner/forward.h"
#include "token_learner/backward_rest.h"
