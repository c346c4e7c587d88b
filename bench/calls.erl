%% Calls another node, over and over, and prints how long each call took.
%%
%%     erl ... -run calls main NODE MILLISECONDS LONG SIZE...
%%
%% The node that this runs on knows how to reach the other one. It does: calls one after the other,
%% on one connection; the same with a new connection for each; calls that carry SIZE octets there
%% and back; and one with LONG octets. The first two take MILLISECONDS each, each SIZE a fifth of
%% that. What comes back has to equal what was sent. Prints JSON: how many nanoseconds each call
%% took. bench/echo.c measures the same without Erlang.
-module(calls).
-export([main/1]).

main([Name, Milliseconds, Long | Sizes]) ->
    Node = list_to_atom(Name),
    Time = list_to_integer(Milliseconds),
    try
        Call = fun() -> Node = rpc:call(Node, erlang, node, []) end,
        Nothing = fun() -> ok end,
        Leave = fun() -> erlang:disconnect_node(Node) end,
        Call(),
        Calls = times(Nothing, Call, Time),
        Connections = times(Leave, Call, Time),
        Echoes = [times(Nothing, echo(Node, Size), Time div 5) || Size <- Sizes],
        [Longest] = times(Nothing, echo(Node, Long), 0),
        io:format(
            "{\"calls\":~w,\"connections\":~w,\"echoes\":~w,\"long\":[~w]}~n",
            [Calls, Connections, Echoes, Longest]
        ),
        halt(0)
    catch
        _:Reason ->
            io:format(standard_error, "calls: ~0p~n", [Reason]),
            halt(1)
    end.

echo(Node, Size) ->
    Sent = rand:bytes(list_to_integer(Size)),
    fun() -> Sent = rpc:call(Node, erlang, iolist_to_binary, [Sent]) end.

%% Of each call, in nanoseconds; at least one. What goes before each is not counted.
times(Before, Call, Milliseconds) ->
    End = erlang:monotonic_time(nanosecond) + Milliseconds * 1000000,
    times(Before, Call, End, []).

times(Before, Call, End, Found) ->
    Before(),
    Begun = erlang:monotonic_time(nanosecond),
    Call(),
    Ended = erlang:monotonic_time(nanosecond),
    Times = [Ended - Begun | Found],
    if
        Ended < End -> times(Before, Call, End, Times);
        true -> lists:reverse(Times)
    end.
