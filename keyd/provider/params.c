/*
 * Reads and fills OSSL_PARAM arrays. Runs in the worker. The arrays come from the libcrypto that
 * calls, which is trusted.
 *
 * libcrypto has functions for this, but calling them would mean linking against one particular
 * libcrypto. These follow OSSL_PARAM(3).
 */
#include "keyd_provider.h"

#include <limits.h>
#include <string.h>
#include <strings.h>

static OSSL_PARAM *locate(OSSL_PARAM *params, const char *name)
{
    for (; params != NULL && params->key != NULL; params++)
        if (strcmp(params->key, name) == 0)
            return params;
    return NULL;
}

const OSSL_PARAM *find_param(const OSSL_PARAM *params, const char *name)
{
    return locate((OSSL_PARAM *)params, name);
}

int get_int(const OSSL_PARAM *param, int *value)
{
    if (param->data == NULL)
        return 0;
    if (param->data_type == OSSL_PARAM_INTEGER && param->data_size == sizeof(int32_t)) {
        int32_t number;
        memcpy(&number, param->data, sizeof number);
        *value = number;
        return 1;
    }
    if (param->data_type == OSSL_PARAM_UNSIGNED_INTEGER && param->data_size == sizeof(uint32_t)) {
        uint32_t number;
        memcpy(&number, param->data, sizeof number);
        if (number > INT_MAX)
            return 0;
        *value = (int)number;
        return 1;
    }
    return 0;
}

int is_text(const OSSL_PARAM *param, const char *text)
{
    size_t length = strlen(text);

    return param->data_type == OSSL_PARAM_UTF8_STRING && param->data != NULL
        && strnlen(param->data, param->data_size) == length
        && strncasecmp(param->data, text, length) == 0;
}

/* Tells the value's length. Returns 1 if the value is to be written, 0 if only that was asked. */
static int announce(OSSL_PARAM *param, size_t length)
{
    param->return_size = length;
    return param->data != NULL;
}

int set_uint(OSSL_PARAM *params, const char *name, uint32_t value)
{
    const uint8_t number[] = {(uint8_t)(value >> 24), (uint8_t)(value >> 16),
                              (uint8_t)(value >> 8), (uint8_t)value};
    OSSL_PARAM *param = locate(params, name);

    if (param == NULL)
        return 1;
    if (param->data_type != OSSL_PARAM_INTEGER && param->data_type != OSSL_PARAM_UNSIGNED_INTEGER)
        return 0;
    if (!announce(param, param->data == NULL ? sizeof number : param->data_size))
        return 1;
    if (param->data_size < sizeof number)
        return 0;
    native_order(number, sizeof number, param->data, param->data_size);
    return 1;
}

int set_text(OSSL_PARAM *params, const char *name, const char *text)
{
    size_t length = strlen(text);
    OSSL_PARAM *param = locate(params, name);

    if (param == NULL)
        return 1;
    if (param->data_type != OSSL_PARAM_UTF8_STRING)
        return 0;
    if (!announce(param, length))
        return 1;
    if (param->data_size < length)
        return 0;
    memcpy(param->data, text, length);
    if (param->data_size > length)
        ((char *)param->data)[length] = '\0';
    return 1;
}

int set_octets(OSSL_PARAM *params, const char *name, const uint8_t *octets, size_t length)
{
    OSSL_PARAM *param = locate(params, name);

    if (param == NULL)
        return 1;
    if (param->data_type != OSSL_PARAM_OCTET_STRING)
        return 0;
    if (!announce(param, length))
        return 1;
    if (param->data_size < length)
        return 0;
    memcpy(param->data, octets, length);
    return 1;
}

int set_big(OSSL_PARAM *params, const char *name, const uint8_t *number, size_t length)
{
    OSSL_PARAM *param = locate(params, name);

    if (param == NULL)
        return 1;
    if (param->data_type != OSSL_PARAM_UNSIGNED_INTEGER)
        return 0;
    if (!announce(param, length))
        return 1;
    if (param->data_size < length)
        return 0;
    param->return_size = param->data_size;
    native_order(number, length, param->data, param->data_size);
    return 1;
}

void native_order(const uint8_t *number, size_t length, uint8_t *native, size_t size)
{
    memset(native, 0, size);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    memcpy(native + size - length, number, length);
#else
    for (size_t i = 0; i < length; i++)
        native[i] = number[length - 1 - i];
#endif
}
