/*
 * The provider's entry point: configuration, context, errors, and what it offers.
 *
 * Runs in the worker, or in whatever program loads it. It trusts the OpenSSL configuration that
 * loads it. A mistake in that is kept, and raised as an error when a reference is read: OpenSSL
 * says nothing about a provider that fails to load.
 */
#include "keyd_provider.h"

#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/core_names.h>

#define VERSION "1"
#define DEFAULT_TIMEOUT_MS 10000
#define MAX_TIMEOUT_MS 86400000

/* The reasons in OpenSSL's errors. Some applications show nothing else of an error. */
static const OSSL_ITEM reasons[] = {
    {REASON_CONFIGURATION, "bad provider configuration"},
    {REASON_MEMORY, "out of memory"},
    {REASON_REFERENCE, "malformed key reference"},
    {REASON_UNSUPPORTED, "not for keyd"},
    {REASON_NO_CHANNEL, "no channel to keyd configured"},
    {REASON_UNREACHABLE, "keyd cannot be reached"},
    {REASON_ABSENT, "keyd cannot be reached: no such socket"},
    {REASON_UNHEARD, "keyd cannot be reached: connection refused"},
    {REASON_DENIED, "keyd cannot be reached: permission denied"},
    {REASON_GONE, "keyd is gone"},
    {REASON_SLOW, "no answer in time"},
    {REASON_NONSENSE, "nonsensical answer"},
    {REASON_REFUSED + 1, "refused: malformed"},
    {REASON_REFUSED + 2, "refused: not granted"},
    {REASON_REFUSED + 3, "refused: unknown key"},
    {REASON_REFUSED + 4, "refused: not TLS"},
    {REASON_REFUSED + 5, "refused: exhausted"},
    {REASON_REFUSED + 6, "refused: expired"},
    {REASON_REFUSED + 7, "refused: failed"},
    {REASON_REFUSED + 8, "refused: unwitnessed"},
    {0, NULL},
};

const char *refusal(int status)
{
    for (const OSSL_ITEM *item = reasons; item->id != 0; item++)
        if (item->id == REASON_REFUSED + (unsigned int)status)
            return item->ptr;
    return "refused";
}

void raise_at(const struct provider *provider, int line, const char *function, enum reason reason,
              const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    provider->new_error(provider->core);
    provider->set_error_debug(provider->core, "keyd provider", line, function);
    provider->vset_error(provider->core, reason, format, arguments);
    va_end(arguments);
}

/* The text as a decimal number; -1 if it is anything else, or out of bounds. */
static int decimal(const char *text, int least, int most)
{
    int64_t number = 0;

    if (*text == '\0')
        return -1;
    for (; *text != '\0'; text++) {
        if (*text < '0' || *text > '9')
            return -1;
        number = number * 10 + (*text - '0');
        if (number > most)
            return -1;
    }
    return number < least ? -1 : (int)number;
}

/* Returns NULL, or the mistake. */
static const char *configure(struct provider *provider, OSSL_FUNC_core_get_params_fn *get_params)
{
    char *fd = NULL, *next = NULL, *path = NULL, *timeout = NULL;
    OSSL_PARAM wanted[] = {
        OSSL_PARAM_utf8_ptr("channel_fd", &fd, 0),
        OSSL_PARAM_utf8_ptr("next_channel_fd", &next, 0),
        OSSL_PARAM_utf8_ptr("socket", &path, 0),
        OSSL_PARAM_utf8_ptr("timeout_ms", &timeout, 0),
        OSSL_PARAM_END,
    };

    provider->channel_fd = provider->next_channel_fd = -1;
    provider->address.sun_family = AF_UNIX;
    provider->timeout_ms = DEFAULT_TIMEOUT_MS;
    if (!get_params(provider->core, wanted))
        return "the configuration cannot be read";
    if (fd != NULL && path != NULL)
        return "channel_fd and socket are both set";
    if (fd != NULL && (provider->channel_fd = decimal(fd, 0, INT_MAX)) < 0)
        return "channel_fd is no file descriptor";
    if (next != NULL && (provider->next_channel_fd = decimal(next, 0, INT_MAX)) < 0)
        return "next_channel_fd is no file descriptor";
    if (path != NULL) {
        size_t length = strlen(path);

        if (length == 0 || length >= sizeof provider->address.sun_path)
            return "socket is empty or too long a path";
        memcpy(provider->address.sun_path, path, length + 1);
    }
    if (timeout != NULL && (provider->timeout_ms = decimal(timeout, 1, MAX_TIMEOUT_MS)) < 0)
        return "timeout_ms is not within 1 to 86400000";
    return NULL;
}

static void teardown(void *context)
{
    struct provider *provider = context;
    struct connection *kept = take_connection(provider);

    if (kept != NULL)
        end_connection(kept);
    free(provider->kept);
    free(provider);
}

static const OSSL_PARAM *gettable_params(void *provider)
{
    static const OSSL_PARAM gettable[] = {
        OSSL_PARAM_DEFN(OSSL_PROV_PARAM_NAME, OSSL_PARAM_UTF8_PTR, NULL, 0),
        OSSL_PARAM_DEFN(OSSL_PROV_PARAM_VERSION, OSSL_PARAM_UTF8_PTR, NULL, 0),
        OSSL_PARAM_DEFN(OSSL_PROV_PARAM_STATUS, OSSL_PARAM_INTEGER, NULL, 0),
        OSSL_PARAM_END,
    };

    (void)provider;
    return gettable;
}

static int set_pointer(OSSL_PARAM *params, const char *name, const char *text)
{
    for (; params->key != NULL; params++) {
        if (strcmp(params->key, name) != 0)
            continue;
        if (params->data_type != OSSL_PARAM_UTF8_PTR)
            return 0;
        params->return_size = strlen(text);
        if (params->data != NULL)
            *(const char **)params->data = text;
    }
    return 1;
}

static int get_params(void *provider, OSSL_PARAM params[])
{
    (void)provider;
    return set_pointer(params, OSSL_PROV_PARAM_NAME, "keyd")
        && set_pointer(params, OSSL_PROV_PARAM_VERSION, VERSION)
        && set_uint(params, OSSL_PROV_PARAM_STATUS, 1);
}

static const OSSL_ALGORITHM *query_operation(void *provider, int operation, int *no_cache)
{
    (void)provider;
    *no_cache = 0;
    switch (operation) {
    case OSSL_OP_KEYMGMT:
        return key_managers;
    case OSSL_OP_SIGNATURE:
        return signatures;
    case OSSL_OP_ASYM_CIPHER:
        return ciphers;
    case OSSL_OP_DECODER:
        return decoders;
    default:
        return NULL;
    }
}

static const OSSL_ITEM *reason_strings(void *provider)
{
    (void)provider;
    return reasons;
}

static const OSSL_DISPATCH provider_functions[] = {
    {OSSL_FUNC_PROVIDER_TEARDOWN, (void (*)(void))teardown},
    {OSSL_FUNC_PROVIDER_GETTABLE_PARAMS, (void (*)(void))gettable_params},
    {OSSL_FUNC_PROVIDER_GET_PARAMS, (void (*)(void))get_params},
    {OSSL_FUNC_PROVIDER_QUERY_OPERATION, (void (*)(void))query_operation},
    {OSSL_FUNC_PROVIDER_GET_REASON_STRINGS, (void (*)(void))reason_strings},
    {0, NULL},
};

__attribute__((visibility("default"))) int OSSL_provider_init(const OSSL_CORE_HANDLE *core,
                                                              const OSSL_DISPATCH *upcalls,
                                                              const OSSL_DISPATCH **functions,
                                                              void **context)
{
    OSSL_FUNC_core_get_params_fn *core_get_params = NULL;
    struct provider *provider = calloc(1, sizeof *provider);

    if (provider == NULL)
        return 0;
    if ((provider->kept = calloc(1, sizeof *provider->kept)) == NULL) {
        free(provider);
        return 0;
    }
    provider->core = core;
    for (; upcalls->function_id != 0; upcalls++) {
        switch (upcalls->function_id) {
        case OSSL_FUNC_CORE_GET_PARAMS:
            core_get_params = OSSL_FUNC_core_get_params(upcalls);
            break;
        case OSSL_FUNC_CORE_NEW_ERROR:
            provider->new_error = OSSL_FUNC_core_new_error(upcalls);
            break;
        case OSSL_FUNC_CORE_SET_ERROR_DEBUG:
            provider->set_error_debug = OSSL_FUNC_core_set_error_debug(upcalls);
            break;
        case OSSL_FUNC_CORE_VSET_ERROR:
            provider->vset_error = OSSL_FUNC_core_vset_error(upcalls);
            break;
        case OSSL_FUNC_BIO_READ_EX:
            provider->bio_read_ex = OSSL_FUNC_BIO_read_ex(upcalls);
            break;
        case OSSL_FUNC_BIO_GETS:
            provider->bio_gets = OSSL_FUNC_BIO_gets(upcalls);
            break;
        }
    }
    if (core_get_params == NULL || provider->new_error == NULL || provider->set_error_debug == NULL
        || provider->vset_error == NULL || provider->bio_read_ex == NULL
        || provider->bio_gets == NULL) {
        teardown(provider);
        return 0;
    }
    provider->mistake = configure(provider, core_get_params);
    *functions = provider_functions;
    *context = provider;
    return 1;
}
