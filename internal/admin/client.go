package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"syscall"
	"time"
)

// Bounds of the client.
const (
	retryFor    = 2 * time.Second // how long a supervisor may take to come back
	retryEvery  = 20 * time.Millisecond
	maxAnswer   = 256 << 20 // bytes; a million sessions
	maxLine     = 16 << 20
	askTimeout  = 10 * time.Second // one attempt to get an answer that takes no time
	connTimeout = 5 * time.Second
)

// Client talks to the supervisor that serves on one admin socket. It holds no
// connection; any number of goroutines may use it.
type Client struct {
	path string
	http *http.Client
}

// Dial returns a client for the socket at path. It connects when it is used.
func Dial(path string) *Client {
	d := net.Dialer{Timeout: connTimeout}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		},
	}}}
}

// Path is the socket's path.
func (c *Client) Path() string { return c.path }

// Status asks for the state of everything. A supervisor that is being replaced or
// restarted is waited for, up to 2 s.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var st Status
	if err := c.get(ctx, "/v1/status", &st); err != nil {
		return nil, err
	}
	return &st, nil
}

// Sessions lists the live sessions; it waits as Status does.
func (c *Client) Sessions(ctx context.Context) ([]Session, error) {
	var list []Session
	err := c.get(ctx, "/v1/sessions", &list)
	return list, err
}

// Upgrade upgrades pools and blocks until that is done; progress, which may be
// nil, is called meanwhile. A client that goes away stops nothing. An error means
// that nothing was started, or, if it is ErrInterrupted, that nobody knows.
func (c *Client) Upgrade(ctx context.Context, r UpgradeRequest, progress func(Progress)) (*UpgradeReport, error) {
	var rep UpgradeReport
	if err := c.operate(ctx, "/v1/upgrade", r, &rep, progress); err != nil {
		return nil, err
	}
	return &rep, nil
}

// UpgradeSupervisor replaces the supervisor; otherwise as Upgrade.
func (c *Client) UpgradeSupervisor(ctx context.Context, progress func(Progress)) (*SupervisorReport, error) {
	var rep SupervisorReport
	if err := c.operate(ctx, "/v1/upgrade-supervisor", struct{}{}, &rep, progress); err != nil {
		return nil, err
	}
	return &rep, nil
}

// Rekey changes the sending keys of sessions; otherwise as Upgrade.
func (c *Client) Rekey(ctx context.Context, r RekeyRequest, progress func(Progress)) (*RekeyReport, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	var rep RekeyReport
	if err := c.operate(ctx, "/v1/rekey", r, &rep, progress); err != nil {
		return nil, err
	}
	return &rep, nil
}

// Stop ends the unit and blocks until nothing listens on the socket any more, that
// is until the keeper, too, is gone. 0 means the supervisor's default grace.
func (c *Client) Stop(ctx context.Context, grace time.Duration) error {
	err := c.operate(ctx, "/v1/stop", StopRequest{Grace: grace}, &struct{}{}, nil)
	// A supervisor that stops may be gone before its answer is out; what counts is
	// that it is gone.
	if err != nil && !errors.Is(err, ErrInterrupted) {
		return err
	}
	return c.waitGone(ctx)
}

func (c *Client) waitGone(ctx context.Context) error {
	t := time.NewTicker(retryEvery)
	defer t.Stop()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.path)
		switch {
		case err == nil:
			_ = conn.Close()
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still being served: %w", c.path, context.Cause(ctx))
		case <-t.C:
		}
	}
}

func (c *Client) get(ctx context.Context, path string, v any) error {
	return retry(ctx, func() error { return c.getOnce(ctx, path, v) }, ErrInterrupted, ErrEnding)
}

// retry repeats f for up to 2 s while it fails with one of the given errors.
func retry(ctx context.Context, f func() error, errs ...error) error {
	var giveUp time.Time
	for {
		err := f()
		if ctx.Err() != nil || !slices.ContainsFunc(errs, func(e error) bool { return errors.Is(err, e) }) {
			return err
		}
		now := time.Now()
		if giveUp.IsZero() {
			giveUp = now.Add(retryFor)
		} else if now.After(giveUp) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryEvery):
		}
	}
}

func (c *Client) getOnce(ctx context.Context, path string, v any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, askTimeout,
		fmt.Errorf("no answer from the supervisor at %s within %s", c.path, askTimeout))
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return c.explain(ctx, err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%s: the answer is not what a ktlsvisor says: %w", c.path, err)
	}
	return nil
}

func (c *Client) operate(ctx context.Context, path string, req, result any, progress func(Progress)) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	// ErrEnding is the one failure that is known to have started nothing.
	var resp *http.Response
	if err := retry(ctx, func() (err error) {
		resp, err = c.do(ctx, http.MethodPost, path, body)
		return err
	}, ErrEnding); err != nil {
		return err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, maxLine)
	for sc.Scan() {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return fmt.Errorf("%s: the answer is not what a ktlsvisor says: %w", c.path, err)
		}
		switch {
		case l.Error != nil:
			return &remoteError{*l.Error}
		case l.Result != nil:
			if err := json.Unmarshal(l.Result, result); err != nil {
				return fmt.Errorf("%s: the answer is not what a ktlsvisor says: %w", c.path, err)
			}
			return nil
		case l.Progress != nil && progress != nil:
			progress(*l.Progress)
		}
	}
	err = sc.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return c.explain(ctx, err)
}

// do returns only answers with status 200; the caller closes their body.
func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://ktlsvisor"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var l line
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxLine)).Decode(&l); err != nil || l.Error == nil {
		return nil, fmt.Errorf("%s: unexpected answer %s; is this a ktlsvisor's admin socket?", c.path, resp.Status)
	}
	return nil, &remoteError{*l.Error}
}

// explain turns a failure to get an answer into words and into an error that
// callers can decide on.
func (c *Client) explain(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s: start it with \"ktlsvisor run\", or name the socket of a running one with --admin", ErrNotRunning, c.path)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: %s belongs to another user: run this as that user or as root", ErrForbidden, c.path)
	}
	// net/http has no error to recognise for a connection that ends before its
	// answer; so all that does not fail in connecting is that. EAGAIN is a full
	// queue: nobody accepts for the moment.
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" && !errors.Is(err, syscall.EAGAIN) {
		return fmt.Errorf("%s: %w", c.path, op.Err)
	}
	return fmt.Errorf("%s: %w (%w)", c.path, ErrInterrupted, err)
}
