// A workload written with go-spiffe; ../README.md says what it prints.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

type event map[string]any

var output sync.Mutex

func report(e event) {
	output.Lock()
	defer output.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(e)
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		report(event{"event": "error", "text": err.Error()})
		os.Exit(1)
	}
	report(event{"event": "end"})
}

func run(arguments []string) error {
	if len(arguments) == 1 && arguments[0] == "paths" {
		return paths(os.Stdin)
	}
	client, err := workloadapi.New(context.Background())
	if err != nil {
		return err
	}
	defer client.Close()
	switch {
	case len(arguments) == 2 && arguments[0] == "once":
		return once(client, arguments[1])
	case len(arguments) == 1 && arguments[0] == "watch":
		return watch(client)
	default:
		return fmt.Errorf("usage: once AUDIENCE | watch | paths < CASES")
	}
}

func once(client *workloadapi.Client, audience string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	x509Context, err := client.FetchX509Context(ctx)
	if err != nil {
		return err
	}
	x509Bundles, err := client.FetchX509Bundles(ctx)
	if err != nil {
		return err
	}
	for _, svid := range x509Context.SVIDs {
		if _, _, err := x509svid.Verify(svid.Certificates, x509Bundles); err != nil {
			return err
		}
	}
	reportX509SVIDs(x509Context.SVIDs)
	reportX509Bundles(x509Bundles)

	jwt, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return err
	}
	report(event{"event": "jwt_svid", "id": jwt.ID.String(), "audience": jwt.Audience, "expires_at": jwt.Expiry.Unix()})
	jwtBundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return err
	}
	reportJWTBundles(jwtBundles)
	valid, err := client.ValidateJWTSVID(ctx, jwt.Marshal(), audience)
	if err != nil {
		return err
	}
	report(event{"event": "jwt_valid", "id": valid.ID.String(), "by": "agent"})
	verified, err := jwtsvid.ParseAndValidate(jwt.Marshal(), jwtBundles, []string{audience})
	if err != nil {
		return err
	}
	report(event{"event": "jwt_valid", "id": verified.ID.String(), "by": "library"})
	return nil
}

func watch(client *workloadapi.Client) error {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	var streams sync.WaitGroup
	streams.Go(func() { _ = client.WatchX509Context(ctx, watcher{}) })
	streams.Go(func() { _ = client.WatchJWTBundles(ctx, watcher{}) })
	streams.Wait()
	return nil
}

type watcher struct{}

func (watcher) OnX509ContextUpdate(update *workloadapi.X509Context) {
	reportX509Bundles(update.Bundles)
	reportX509SVIDs(update.SVIDs)
}

func (watcher) OnX509ContextWatchError(err error) {
	report(event{"event": "error", "text": err.Error()})
}

func (watcher) OnJWTBundlesUpdate(update *jwtbundle.Set) {
	reportJWTBundles(update)
}

func (watcher) OnJWTBundlesWatchError(err error) {
	report(event{"event": "error", "text": err.Error()})
}

func reportX509SVIDs(svids []*x509svid.SVID) {
	for _, svid := range svids {
		leaf := svid.Certificates[0]
		report(event{
			"event": "x509_svid", "id": svid.ID.String(), "serial": leaf.SerialNumber.String(), "not_after": leaf.NotAfter.Unix(),
		})
	}
}

func reportX509Bundles(bundles *x509bundle.Set) {
	for _, bundle := range bundles.Bundles() {
		report(event{
			"event": "x509_bundle", "trust_domain": bundle.TrustDomain().Name(), "authorities": len(bundle.X509Authorities()),
		})
	}
}

func reportJWTBundles(bundles *jwtbundle.Set) {
	for _, bundle := range bundles.Bundles() {
		keys := make([]string, 0)
		for key := range bundle.JWTAuthorities() {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		report(event{"event": "jwt_bundle", "trust_domain": bundle.TrustDomain().Name(), "keys": keys})
	}
}
