// Chat is a line-based chat whose members stay connected while the program is
// replaced. Its nicks, rooms and even half-typed lines move to the new program;
// a room moves as one group, so that what a member says during an upgrade
// reaches all the others exactly once.
//
//	go build -o chat1 ./examples/chat
//	go build -o chat2 -ldflags '-X main.stateVersion=2' ./examples/chat
//	ktlsvisor run --listen 127.0.0.1:4433 --self-signed -- ./chat1
//	openssl s_client -quiet -connect 127.0.0.1:4433     # in two terminals: /nick, /join, talk
//	ktlsvisor upgrade --command ./chat2                 # now there is /away, and nobody noticed
//
// The two builds stand for two releases: the second keeps one fact more of each
// member and knows how to restore what the first one wrote.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// stateVersion is set when linking: -ldflags "-X main.stateVersion=2".
var stateVersion = "1"

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "chat:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	c, err := newChat(stateVersion)
	if err != nil {
		return err
	}
	return handoff.Serve(ctx, handoff.HandlerFunc(func(ctx context.Context, conn *handoff.Conn) error {
		return c.serve(ctx, conn)
	}),
		handoff.WithName("chat "+stateVersion),
		handoff.WithSchemas(c.schemas.infos()...),
		handoff.WithGroups(c.rooms))
}
